"""A sweep made ready: the pipeline and the space brought together, and all that can be wrong said before a trial.

A trial is the pipeline itself with other values, and only what its objective needs: its stages are ordinary artifacts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeline.config.document import nearest
from pipeline.config.load import Pipeline, with_overrides
from pipeline.errors import ConfigError, Problem
from pipeline.plan.plan import Plan, make_plan
from pipeline.stage import stop_points, unfingerprinted
from pipeline.sweep.space import Seeds, Space, SpaceFile

if TYPE_CHECKING:
    from pipeline.store.store import ArtifactStore


@dataclass(frozen=True)
class Setting:
    """What one run of the pipeline in a sweep has of its own."""

    values: Mapping[str, Any]  # dotted path -> value
    seed: int | None = None  # None: the seeds that the pipeline has
    steps: int | None = None  # the training ends here; None: at its end


@dataclass(frozen=True)
class Design:
    """A sweep as its trials need it. Can be pickled."""

    pipeline: Pipeline  # what the objective needs, and nothing else
    space: Space
    stage: str  # of the objective
    metric: str
    mode: str
    changed: tuple[str, ...]  # the stages that trials change, in order
    trained: str | None  # the one of them that the rungs are steps of
    seed_paths: tuple[str, ...]

    @property
    def seeds(self) -> list[int | None]:
        """What every setting is tried with."""
        given = self.space.seeds
        if given is None:
            return [None]
        return [*(given.values if isinstance(given, Seeds) else given)]

    @property
    def rungs(self) -> list[int | None]:
        """The steps at which trials are looked at; the last look is at the end of the training."""
        return [*self.space.rung_steps, None]

    def sweep(self, fingerprint: str) -> str:
        """The sweep's id: a hash of the space and of the pipeline without the values that are swept.

        Args:
            fingerprint: of the objective's stage in the first of `examples`; it covers sources too.
        """
        whole = json.dumps([self.space.identity, self.seed_paths, fingerprint], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()[:12]

    def variant(self, setting: Setting) -> Pipeline:
        """The pipeline with a setting's values.

        Raises:
            ConfigError: a stage refuses them.
        """
        values = dict(setting.values)
        if setting.seed is not None:
            values |= dict.fromkeys(self.seed_paths, setting.seed)
        if setting.steps is not None and self.trained is not None:
            values[_stop_point(self.pipeline, self.trained)] = setting.steps
        varied = with_overrides(self.pipeline, [f"{path}={json.dumps(value)}" for path, value in values.items()])
        return only_what_feeds(varied, self.stage)

    def plan(self, setting: Setting, store: ArtifactStore) -> tuple[Pipeline, Plan]:
        """The variant, and what of it is not cached. A cached objective needs nothing of what is above it."""
        varied = self.variant(setting)
        return varied, make_plan(varied, store, from_=[self.stage])


def only_what_feeds(pipeline: Pipeline, stage: str) -> Pipeline:
    """The pipeline without the stages that one stage does not need."""
    needed = {stage}
    for name in reversed(pipeline.stages):
        if name in needed:
            needed |= set(pipeline.stages[name].inputs.values())
    return replace(pipeline, stages={name: entry for name, entry in pipeline.stages.items() if name in needed})


def _stop_point(pipeline: Pipeline, stage: str) -> str:
    """The dotted path of the setting that ends a stage early."""
    return f"stages.{stage}.{next(iter(stop_points(pipeline.stages[stage].stage.config)))}"


def make_design(pipeline: Pipeline, file: SpaceFile) -> Design:
    """Bring pipeline and space together. Opens no store and reads no source.

    Raises:
        ConfigError: with every path that does not exist, every value that a stage refuses, an objective that no stage
            reports.
    """
    space = file.space
    stage, metric = space.objective.split(".", 1)
    problems = list(_objective_problems(pipeline, file, stage, metric))
    if problems:
        raise ConfigError(problems)
    mode = space.mode or pipeline.stages[stage].stage.objectives.get(metric, "max")
    design = Design(only_what_feeds(pipeline, stage), space, stage, metric, mode, (), None, ())
    problems = list(_value_problems(design, file))
    if problems:
        raise ConfigError(problems)
    changed = _changed_stages(design)
    trained, seeds = _trained(design, file, changed), _seed_paths(design, file, changed)
    design = replace(design, changed=tuple(changed), trained=trained, seed_paths=seeds)
    problems = list(_added_problems(design, file))
    if problems:
        raise ConfigError(problems)
    return design


def examples(design: Design) -> Iterator[Setting]:
    """Settings that differ in one value each, to see what depends on what is swept. The first is the base."""
    first = {path: dimension.examples[0] for path, dimension in design.space.space.items()}
    seeds, rungs = design.seeds, design.rungs
    yield Setting(first, seeds[0])
    for path, dimension in design.space.space.items():
        for value in dimension.examples[1:]:
            yield Setting({**first, path: value}, seeds[0])
    for seed in seeds[1:]:
        yield Setting(first, seed)
    for steps in rungs[:-1]:
        yield Setting(first, seeds[0], steps)


def _objective_problems(pipeline: Pipeline, file: SpaceFile, stage: str, metric: str) -> Iterator[Problem]:
    judges = [name for name, entry in pipeline.stages.items() if entry.stage.shows_metrics]
    named = [f"{name}.{metric}" for name in judges for metric in pipeline.stages[name].stage.objectives]
    remedy = f"name one of {', '.join(named or judges)}" if judges else "add an evaluation to the pipeline"
    if stage not in pipeline.stages:
        close = nearest(stage, judges)
        rule = f"{pipeline.file} has no stage {stage!r}"
        yield file.problem(("objective",), rule, close if close.startswith("did") else remedy)
        return
    entry = pipeline.stages[stage].stage
    if not entry.shows_metrics:
        rule = (
            f"{stage!r} is no evaluation: what a training reports, such as its weighted total, changes with the swept "
            "weights themselves, so that trials cannot be compared by it"
        )
        yield file.problem(("objective",), rule, remedy)
    elif entry.objectives and metric not in entry.objectives:
        yield file.problem(("objective",), f"{stage!r} reports no metric {metric!r}", nearest(metric, entry.objectives))


def _value_problems(design: Design, file: SpaceFile) -> Iterator[Problem]:
    """Try every example value of every path alone: the pipeline's own rules say what is wrong with it."""
    before = {name: entry.stage.config for name, entry in design.pipeline.stages.items()}
    for path, dimension in design.space.space.items():
        at, found, changes = ("space", path), set(), False
        if not path.startswith("stages."):
            yield file.problem(at, "only settings of stages are swept", "begin the path with stages.")
            continue
        if path.split(".")[1] not in design.pipeline.stages and path.split(".")[1] in _stage_names(design.pipeline):
            yield file.problem(at, f"the objective {design.space.objective} does not depend on it", "leave it out")
            continue
        if _never_counts(design.pipeline, path):
            yield file.problem(at, "it changes no result, only how one is computed", "leave it out")
            continue
        for value in dimension.examples:
            try:
                varied = design.variant(Setting({path: value}))
            except ConfigError as error:
                found |= {(problem.path, problem.rule, problem.remedy) for problem in error.problems}
            else:
                changes |= any(before.get(name) != entry.stage.config for name, entry in varied.stages.items())
        for where, rule, remedy in sorted(found):
            place = "" if where == path else f"{where}: "
            yield file.problem(at, f"{place}{rule}", remedy)
        if not found and not changes:
            yield file.problem(at, "its values make no difference to the pipeline", "leave it out, or give others")


def _never_counts(pipeline: Pipeline, path: str) -> bool:
    _, stage, *rest = path.split(".")
    entry, below = pipeline.stages.get(stage), ".".join(rest)
    ignored = unfingerprinted(entry.stage.config) if entry is not None else []
    return any(below == other or below.startswith(f"{other}.") for other in ignored)


def _stage_names(pipeline: Pipeline) -> set[str]:
    stages = pipeline.document.child("stages")
    return set(stages.value) if stages is not None else set()


def _changed_stages(design: Design) -> list[str]:
    """The stages that the swept values change, or that read one of these; in order."""
    first, *others = [design.variant(setting) for setting in examples(replace(design, space=_without_rungs(design)))]
    others.append(design.pipeline)
    changed: list[str] = []
    for name, entry in first.stages.items():
        own = any(name not in other.stages or other.stages[name].stage.config != entry.stage.config for other in others)
        if own or set(entry.inputs.values()) & set(changed):
            changed.append(name)
    return changed


def _without_rungs(design: Design) -> Space:
    """Rungs and seeds are placed when it is known what the trials change."""
    return design.space.model_copy(update={"rungs": None, "seeds": None})


def _trained(design: Design, file: SpaceFile, changed: list[str]) -> str | None:
    """The stage whose steps the rungs are."""
    if not design.space.rung_steps:
        return None
    stages = design.pipeline.stages
    able = [name for name in changed if stop_points(stages[name].stage.config)]
    given = getattr(design.space.rungs, "stage", None)
    if given in able:
        return str(given)
    if given is None and len(able) == 1:
        return able[0]
    if given is not None:
        rule = f"{given!r} is no training that the trials change"
        remedy = f"name one of {', '.join(able)}" if able else "leave rungs and scheduler out"
        raise ConfigError([file.problem(("rungs", "stage"), rule, remedy)])
    if able:
        rule, remedy = (
            f"the trials change several trainings: {', '.join(able)}",
            "say which: {stage: NAME, steps: [...]}",
        )
    else:
        rule = f"the trials change no stage that can stop early ({', '.join(changed)})"
        remedy = "leave rungs and scheduler out"
    raise ConfigError([file.problem(("rungs",), rule, remedy)])


def _seed_paths(design: Design, file: SpaceFile, changed: list[str]) -> tuple[str, ...]:
    given = design.space.seeds
    if isinstance(given, Seeds) and given.paths:
        return tuple(given.paths)
    if given is None:
        return ()
    stages = design.pipeline.stages
    trains = [name for name in changed if stop_points(stages[name].stage.config)]
    seeded = [name for name in trains or changed if "seed" in type(stages[name].stage.config).model_fields]
    if not seeded:
        rule, remedy = "the trials change no stage with a setting `seed`", "name it: {values: [...], paths: [...]}"
        raise ConfigError([file.problem(("seeds",), rule, remedy)])
    return tuple(f"stages.{name}.seed" for name in seeded)


def _added_problems(design: Design, file: SpaceFile) -> Iterator[Problem]:
    """What stages refuse of the seeds and rungs."""
    first = next(examples(design)).values
    tried = [(("seeds",), Setting(first, seed)) for seed in design.seeds]
    tried += [(("rungs",), Setting(first, design.seeds[0], steps)) for steps in design.space.rung_steps]
    for where, setting in tried:
        try:
            design.variant(setting)
        except ConfigError as error:
            for problem in error.problems:
                yield file.problem(where, f"{problem.path}: {problem.rule}", problem.remedy)
            return
    if overlap := set(design.seed_paths) & set(design.space.space):
        yield file.problem(("seeds",), f"{sorted(overlap)[0]} is swept too", "leave it out of space or of seeds")
