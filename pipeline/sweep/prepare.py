"""What a sweep computes, found before it begins: stages that all trials share, what is cached, and about how long."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.config.load import Pipeline
from pipeline.errors import ConfigError, Problem, StoreError
from pipeline.plan import history
from pipeline.plan.plan import Plan, make_plan
from pipeline.sweep.design import Design, Setting, examples
from pipeline.sweep.draw import draw

if TYPE_CHECKING:
    from pipeline.store.store import ArtifactStore
    from pipeline.sweep.record import Trial
    from pipeline.sweep.space import SpaceFile


@dataclass(frozen=True)
class Prepared:
    """A design beside a store."""

    design: Design
    sweep: str  # the id
    base: Pipeline  # a variant; its shared stages are those of all trials
    shared: list[str]  # stages that no trial changes, in order
    own: list[str]  # stages that trials change

    @property
    def name(self) -> str:
        """Under which the trials' artifacts are used, and the best trial's pipeline is written."""
        return f"{self.design.pipeline.name}-sweep-{self.sweep[:8]}"

    def shared_plan(self, store: ArtifactStore) -> Plan | None:
        """What of the shared stages has to run first; None where nothing does."""
        if not self.shared:
            return None
        plan = make_plan(self.base, store, only=self.shared)
        return plan if plan.to_run else None


def prepare(design: Design, file: SpaceFile, store: ArtifactStore) -> Prepared:
    """Plan trials that differ in one value each.

    Raises:
        ConfigError: a source is missing, or values do not fit the inputs.
    """
    fingerprints: dict[str, set[str]] = {}
    base: tuple[Pipeline, Plan] | None = None
    for setting in examples(design):
        pipeline, plan = _plan(design, setting, file, store)
        base = base or (pipeline, plan)
        for name, planned in plan.needed.items():
            fingerprints.setdefault(name, set()).add(planned.fingerprint)
    assert base is not None
    shared = [name for name in base[1].needed if len(fingerprints[name]) == 1 and name not in design.changed]
    own = [name for name in base[1].needed if name not in shared]
    if not own:
        raise ConfigError([file.problem(("space",), "its values give the same artifacts", "give others")])
    return Prepared(design, design.sweep(base[1].needed[design.stage].fingerprint), base[0], shared, own)


def check_values(prepared: Prepared, file: SpaceFile, store: ArtifactStore) -> None:
    """Ask the stages about all example values again, once the shared artifacts are there.

    Raises:
        ConfigError: what these artifacts hold does not suit a value, such as a rung beyond the end of the training.
    """
    for setting in examples(prepared.design):
        _plan(prepared.design, setting, file, store)


def _plan(design: Design, setting: Setting, file: SpaceFile, store: ArtifactStore) -> tuple[Pipeline, Plan]:
    """Plan a trial. What is wrong with a value of the space is said at its place there, all else at the pipeline's."""
    try:
        return design.plan(setting, store)
    except ConfigError as error:
        raise ConfigError([_placed(design, setting, file, problem) for problem in error.problems]) from error


def _placed(design: Design, setting: Setting, file: SpaceFile, problem: Problem) -> Problem:
    swept = [path for path in design.space.space if f"{problem.path}.".startswith(f"{path}.")]
    if swept:
        return file.problem(("space", swept[0]), problem.rule, problem.remedy)
    first = next(examples(design))
    if setting == first:
        return problem
    varied = [path for path, value in setting.values.items() if value != first.values[path]]
    where = ("space", *varied) if varied else ("rungs",) if setting.steps is not None else ("seeds",)
    return file.problem(where, f"{problem.path}: {problem.rule}", problem.remedy)


# -- how much there is to do -----------------------------------------------------------------------------------------


@dataclass
class Estimate:
    """What a sweep needs, in stage runs. Where the scheduler ends trials early, it is less."""

    trials: int
    kept: int  # trials that an earlier command has finished
    needed: int = 0  # different stage runs
    cached: int = 0
    shared: int = 0  # of `needed`, those that all trials have in common
    separate: int = 0  # stage runs of so many separate pipelines from an empty store
    seconds: float = 0.0  # of those that are not cached, one after the other
    unknown: list[str] = field(default_factory=list)  # stages that no earlier run has timed


def estimate(prepared: Prepared, store: ArtifactStore, known: Collection[Trial]) -> Estimate:
    """Count stage runs. Settings that are not drawn yet are drawn at random: their number is the same."""
    design, space = prepared.design, prepared.design.space
    over = {trial.number: trial for trial in known if trial.over}
    found = Estimate(space.settings_to_try, len(over))
    values = {trial.number: trial.values for trial in known}
    drawn_as = space if space.search != "optuna" else space.model_copy(update={"search": "random"})
    runs: dict[tuple[str, str], tuple[str, int | None, bool]] = {}  # artifact -> stage, steps, cached
    for number in range(found.trials):
        trial = values.get(number) or draw(drawn_as, design.mode, number)
        for seed in design.seeds:
            for steps in design.rungs:
                _, plan = design.plan(Setting(trial, seed, steps), store)
                ended = number in over or plan.needed[design.stage].artifact is not None
                for name, planned in plan.needed.items():
                    if planned.state == "cached" or not ended:  # what has ended needs nothing more
                        runs[planned.kind, planned.fingerprint] = name, steps, planned.state == "cached"
            found.separate += len(plan.needed)
    found.needed, found.cached = len(runs), sum(cached for _, _, cached in runs.values())
    found.shared = len(prepared.shared)
    seconds = {name: _seconds(prepared, name, store, over.values()) for name, _, _ in runs.values()}
    for name, steps, cached in runs.values():
        known_seconds = seconds[name]
        if known_seconds is None:
            found.unknown = list(dict.fromkeys([*found.unknown, name]))
        elif not cached and (steps is None or name != design.trained):  # its rungs are parts of one training
            found.seconds += known_seconds
    return found


def _seconds(prepared: Prepared, stage: str, store: ArtifactStore, over: Iterable[Trial]) -> float | None:
    """What a stage took when this sweep or its pipeline last ran it; None where that is not known.

    A training, which trials make in parts, took what it did in the finished trials.
    """
    design = prepared.design
    names = [prepared.name, design.pipeline.name]
    if stage == design.trained:
        parts = [[rung.stages.get(stage, 0.0) for rung in trial.rungs] for trial in over if trial.state == "finished"]
        whole = [sum(seconds) / len(design.seeds) for seconds in parts if all(seconds)]
        if whole:
            return sum(whole) / len(whole)
        names = names[1:]
    for pipeline in names:
        last = history.recall(store, pipeline, stage)
        if last is not None:
            with contextlib.suppress(StoreError):
                artifact = store.find(prepared.design.pipeline.stages[stage].kind, last["fingerprint"])
                if artifact is not None:
                    return artifact.manifest.seconds
    return None
