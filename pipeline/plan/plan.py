"""What a run would do, and why: for every stage its fingerprint, whether the store has its artifact, and the reasons.

Selections, all by stage name:
- `only`: just these stages. What they read must be cached: a UsageError says which stage is missing and why.
- `from_`: these stages and everything downstream of them. What they need from upstream comes from the cache, and is
  run where the cache lacks it; side branches are left alone.
- `force`: run these although they are cached. What is downstream keeps its fingerprint, so it stays cached.

A plan lists the selected stages and, of those that must run, the stages they read. Making one opens no source file
and no artifact that was not touched, and imports neither Ray nor torch nor MLflow.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from pipeline.config.document import nearest, nearest_path
from pipeline.config.load import Pipeline, PipelineStage
from pipeline.errors import ArtifactDamaged, ConfigError, Problem, SourceError, StoreError, UsageError
from pipeline.paths import local_path
from pipeline.plan import history
from pipeline.plan.fingerprint import Identity, fingerprint, identity
from pipeline.plan.sources import as_json, source_digest
from pipeline.stage import Feed
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore

ReadingCallback = Callable[[str, float, float, str], None]  # a source's address, then as in ProgressCallback


@dataclass
class PlannedStage:
    """One stage of a plan."""

    name: str
    uses: str
    kind: str
    fingerprint: str
    state: Literal["cached", "run"]
    reasons: list[str]  # why it must run; empty when it is cached
    inputs: dict[str, str]  # dotted field path -> stage name
    artifact: Artifact | None  # the cached one; None for a stage that must run
    identity: Identity = field(repr=False)
    whole: str  # the fingerprint that it has when it does not stop early
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)  # path -> {address, digest, files, bytes}
    replaces: str = ""  # the attempt that made the artifact which `force` replaces

    def to_json(self) -> dict[str, Any]:
        """One entry of `stages` in what `tessera plan --json` prints."""
        keys = ("name", "uses", "kind", "fingerprint", "state", "reasons", "inputs")
        return {key: getattr(self, key) for key in keys}

    @property
    def known_as(self) -> history.Entry:
        """What history keeps of it, once its artifact is there."""
        addresses = {path: source["address"] for path, source in self.sources.items()}
        return history.Entry(
            fingerprint=self.fingerprint, identity=self.identity, inputs=self.inputs, sources=addresses
        )


@dataclass
class Plan:
    """What a run would do, in execution order."""

    pipeline: str
    stages: list[PlannedStage]
    needed: dict[str, PlannedStage] = field(default_factory=dict, repr=False)  # these and all upstream, by name

    @property
    def to_run(self) -> list[PlannedStage]:
        """The stages that are not cached."""
        return [stage for stage in self.stages if stage.state == "run"]

    def to_json(self) -> dict[str, Any]:
        """What `tessera plan --json` prints."""
        return {"pipeline": self.pipeline, "stages": [stage.to_json() for stage in self.stages]}


def make_plan(
    pipeline: Pipeline,
    store: ArtifactStore,
    only: Collection[str] = (),
    from_: Collection[str] = (),
    force: Collection[str] = (),
    report_reading: ReadingCallback | None = None,
    *,
    remember: bool = True,
) -> Plan:
    """Plan a run of a pipeline, or of the part of it that `only` and `from_` select together.

    Args:
        pipeline: as loaded.
        store: where its artifacts are.
        only: names of stages, see above.
        from_: likewise.
        force: likewise.
        report_reading: called while sources are read.
        remember: keep in the store what sources were found to hold, so that the next plan need not read them.

    Raises:
        UsageError: the selection is not possible.
        ConfigError: names every stage whose source is missing or empty, or whose inputs do not belong together; or
            the store, when a stage must run and nothing can be written there.
        StoreError: the store cannot be read.
    """
    _check_names(pipeline, {"--only": only, "--from": from_, "--force": force})
    chosen = _selection(pipeline, only, from_)
    if outside := [name for name in force if name not in chosen]:
        raise UsageError(f"--force {outside[0]}: the stage is not part of what is to run (add it to --only or --from)")
    needed = _upstream(pipeline, chosen)
    digests = _source_digests(pipeline, store, needed, report_reading, remember)
    planned: dict[str, PlannedStage] = {}
    for name in pipeline.stages:
        if name in needed:
            stage = pipeline.stages[name]
            planned[name] = _planned(pipeline, store, stage, digests.get(name, {}), planned, name in force)
    wanted = _wanted(planned, chosen, strict=bool(only) and not from_)
    if problems := check_inputs(pipeline, planned, {name for name in wanted if planned[name].state == "run"}):
        raise ConfigError(problems)
    plan = Plan(pipeline.name, [stage for name, stage in planned.items() if name in wanted], planned)
    if plan.to_run and remember:  # what is cached can be read from a store that this user may not write
        _require_writable(pipeline, store)
    return plan


def _planned(
    pipeline: Pipeline,
    store: ArtifactStore,
    stage: PipelineStage,
    sources: dict[str, dict[str, Any]],
    before: dict[str, PlannedStage],
    forced: bool,
) -> PlannedStage:
    digests = {path: source["digest"] for path, source in sources.items()}
    fed_by = {path: before[name].fingerprint for path, name in stage.inputs.items()}
    what = identity(stage.uses, stage.stage, digests, fed_by)
    name = fingerprint(what)
    whole = fingerprint(identity(stage.uses, stage.stage, digests, fed_by, whole=True))
    artifact, damage = _look_up(store, stage.kind, name)
    planned = PlannedStage(
        stage.name, stage.uses, stage.kind, name, "cached", [], stage.inputs, artifact, what, whole, dict(sources)
    )
    if artifact is not None and not damage and not forced:
        return planned
    planned.state, planned.artifact = "run", None
    if damage:
        planned.reasons = [f"artifact damaged: {', '.join(damage[:3])}" + (", ..." if len(damage) > 3 else "")]
    elif artifact is not None:
        planned.reasons, planned.replaces = ["forced"], artifact.manifest.attempt
    else:
        planned.reasons = _reasons(pipeline, store, planned)
    return planned


def _look_up(store: ArtifactStore, kind: str, name: str) -> tuple[Artifact | None, list[str]]:
    """The artifact, if there is a valid manifest, and the names of its damaged files."""
    try:
        artifact = store.find(kind, name)
    except ArtifactDamaged as error:
        return None, [error.file]
    return artifact, [damage.file for damage in store.check(artifact)] if artifact is not None else []


def _reasons(pipeline: Pipeline, store: ArtifactStore, planned: PlannedStage) -> list[str]:
    last = history.recall(store, pipeline.name, planned.name)
    if last is None:
        return ["new"]
    if last["fingerprint"] == planned.fingerprint:
        return ["artifact gone from the store"]
    remarks = pipeline.stages[planned.name].stage.change_remarks
    reasons = []
    for reason in history.differences(planned.name, last, planned.known_as):
        remark = remarks.get(reason.split(" ")[0].removeprefix(f"stages.{planned.name}."))
        reasons.append(f"{reason} ({remark})" if remark else reason)
    return reasons


def _source_digests(
    pipeline: Pipeline,
    store: ArtifactStore,
    names: Iterable[str],
    report_reading: ReadingCallback | None,
    remember: bool,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Stage -> field path -> what its source holds. One error for all sources that are not as they should be."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    problems: list[Problem] = []
    for name in names:
        for path, address in pipeline.stages[name].sources.items():
            report = partial(report_reading, address) if report_reading is not None else None
            try:
                found.setdefault(name, {})[path] = as_json(
                    source_digest(address, store, report, remember=remember), address
                )
            except SourceError as error:
                here = "://" not in address and address.strip() and not os.path.lexists(local_path(address))
                remedy = (
                    nearest_path(local_path(address)) if here else ""
                ) or "put the files there, or name where they are"
                problems.append(pipeline.problem(f"stages.{name}.{path}", str(error), remedy))
    if problems:
        raise ConfigError(problems)
    return found


def _require_writable(pipeline: Pipeline, store: ArtifactStore) -> None:
    try:
        store.probe_writable()
    except StoreError as error:
        written = pipeline.document.child("store")
        if written is None or written.value != pipeline.store:  # it comes from --store, or is the default
            raise UsageError(str(error)) from error
        rule = str(error).removeprefix(f"store {store.address}: ")
        raise ConfigError([pipeline.problem("store", f"{store.address}: {rule}")]) from error


def check_inputs(pipeline: Pipeline, planned: Mapping[str, PlannedStage], names: Collection[str]) -> list[Problem]:
    """Ask stages whether anything is wrong with them beside their inputs.

    Args:
        pipeline: as loaded.
        planned: stage name -> its plan, in execution order, with the artifacts that exist by now.
        names: the stages to ask.
    """
    feeds: dict[str, Feed] = {}
    problems: list[Problem] = []
    for name, stage in planned.items():
        entry = pipeline.stages[name].stage
        above = {path: feeds[feeder] for path, feeder in stage.inputs.items()}
        made = stage.artifact.manifest if stage.artifact is not None else None
        counts, notes = (made.counts, made.notes) if made is not None else (None, None)
        feeds[name] = Feed(name, stage.kind, stage.fingerprint, above, entry.config, counts, notes)
        if name in names:
            for path, what, remedy in entry.mismatches(above):
                problems.append(pipeline.problem(f"stages.{name}.{path}", what, remedy))
    return problems


# -- which stages ----------------------------------------------------------------------------------------------------


def _check_names(pipeline: Pipeline, selections: dict[str, Collection[str]]) -> None:
    for option, names in selections.items():
        for name in names:
            if name not in pipeline.stages:
                remedy = nearest(name, pipeline.stages)
                raise UsageError(f"{option} {name}: {pipeline.file} has no stage {name!r} ({remedy})")


def _selection(pipeline: Pipeline, only: Collection[str], from_: Collection[str]) -> set[str]:
    """The stages that are asked for: all, or `only` plus `from_` and what is downstream of it."""
    if not only and not from_:
        return set(pipeline.stages)
    downstream = set(from_)
    for name, stage in pipeline.stages.items():  # in topological order: one pass is enough
        if downstream & set(stage.inputs.values()):
            downstream.add(name)
    return set(only) | downstream


def _upstream(pipeline: Pipeline, chosen: set[str]) -> list[str]:
    """The chosen stages and all that lies above them, in order: a fingerprint needs every fingerprint above it."""
    needed = set(chosen)
    for name in reversed(pipeline.stages):
        if name in needed:
            needed |= set(pipeline.stages[name].inputs.values())
    return [name for name in pipeline.stages if name in needed]


def _wanted(planned: dict[str, PlannedStage], chosen: set[str], *, strict: bool) -> set[str]:
    """The chosen stages, and what those that must run read.

    `strict` (`only` alone): a stage that is read but neither chosen nor cached is an error.
    """
    wanted = set(chosen)
    for name in reversed(planned):
        stage = planned[name]
        if name not in wanted or stage.state == "cached":
            continue
        for path, feeder in stage.inputs.items():
            above = planned[feeder]
            if strict and above.state == "run" and feeder not in chosen:
                raise UsageError(
                    f"--only {name}: its input {path} comes from {feeder!r}, which is not cached "
                    f"({', '.join(above.reasons)}); add --only {feeder}, or use --from {feeder}"
                )
            wanted.add(feeder)
    return wanted
