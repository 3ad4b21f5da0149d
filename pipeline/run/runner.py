"""Executes a plan: stage after stage, each from finished artifacts to one committed artifact.

Ray, MLflow and everything heavy are imported and started with the first stage that has to run: a pipeline that is all
cached takes the time of its plan. What was committed stays committed, however the run ends.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.errors import ArtifactDamaged, ArtifactMissing, ConfigError
from pipeline.plan import fingerprint, history
from pipeline.plan.plan import check_inputs
from pipeline.run import capacity
from pipeline.run.capacity import Place
from pipeline.run.failure import RunFailed, StagesFailed, explain_in, stopped_by
from pipeline.run.mirrors import require_installed
from pipeline.run.provenance import git_commit, package_versions
from pipeline.run.result import RunResult, StageResult
from pipeline.run.tracking import FAILED, FINISHED, KILLED, StageTracker, Tracker, TrackingAway, masked
from pipeline.stage import Context, Outcome
from pipeline.store import uses

if TYPE_CHECKING:
    from pipeline.config.load import Pipeline, PipelineStage
    from pipeline.plan.plan import Plan, PlannedStage
    from pipeline.run.cluster import Cluster
    from pipeline.run.display import RunDisplay
    from pipeline.store.artifact import Artifact
    from pipeline.store.lease import Holder
    from pipeline.store.store import ArtifactStore


def run(
    pipeline: Pipeline,
    plan: Plan,
    store: ArtifactStore,
    display: RunDisplay,
    *,
    address: str | None = None,
    keep_going: bool = False,
) -> RunResult:
    """Execute what the plan says must run. Every artifact that is committed stays, whatever happens later.

    Args:
        pipeline: as loaded.
        plan: of this pipeline.
        store: where its artifacts are.
        display: shows the progress.
        address: of a Ray cluster; without one a local Ray is started.
        keep_going: when a stage fails, still run the stages that do not need it.

    Raises:
        ConfigError: a stage cannot run on this machine or cluster; nothing was started.
        RunFailed: a stage failed.
        StagesFailed: with `keep_going`, one or more stages failed.
        UsageError: a mirror's package is not installed.
        KeyboardInterrupt, SystemExit: the run was interrupted.
    """
    started = time.monotonic()
    if plan.to_run:
        require_installed(pipeline.mirrors)
    working = _Run(pipeline, store, display, address, keep_going)
    for planned in plan.stages:
        stage = pipeline.stages[planned.name].stage
        working.result.stages.append(
            StageResult(planned, stage.shows_metrics, stage.units, planned.state, artifact=planned.artifact)
        )
    status = FAILED
    try:
        with working.claimed(plan):
            working.check_start(plan)
            for result in working.result.stages:
                if result.state == "run" and not working.skip(result):
                    working.execute(result)
                    if result.artifact is not None:
                        working.remember(result.planned)
                        working.check_below(result, plan)
        if working.failures:
            raise StagesFailed(working.failures, working.result)
        status = FINISHED
    except BaseException as error:
        status = FAILED if isinstance(error, Exception) else KILLED
        raise
    finally:
        working.result.seconds = time.monotonic() - started
        working.close(status)
    return working.result


class _Run:
    """One run, with what its stages share: Ray, the MLflow run, the artifacts so far."""

    def __init__(
        self, pipeline: Pipeline, store: ArtifactStore, display: RunDisplay, address: str | None, keep_going: bool
    ) -> None:
        self.pipeline, self.store, self.display, self.address = pipeline, store, display, address
        self.keep_going = keep_going
        self.failures: list[RunFailed] = []  # with keep_going
        self.result = RunResult(pipeline.name)
        self.began = _now()
        self.tracker = Tracker(pipeline.tracking, pipeline.name, display.warn, pipeline.mirrors)
        self.cluster: Cluster | None = None

    @contextlib.contextmanager
    def claimed(self, plan: Plan) -> Iterator[None]:
        """Keep all that the plan needs from removal while the body runs, and note what is cached as used."""
        with contextlib.ExitStack() as stack:
            if plan.to_run:
                needed = [f"{planned.kind}/{planned.fingerprint}" for planned in plan.needed.values()]
                stack.enter_context(uses.needed_while(self.store.objects, needed))
            for planned in plan.stages:
                if planned.state == "cached":
                    self.remember(planned)
            yield

    def remember(self, planned: PlannedStage) -> None:
        """Keep what the stage was, for later plans, and that this pipeline uses its artifact, for `artifacts gc`."""
        history.remember(self.store, self.pipeline.name, planned.name, planned.known_as)
        artifact = f"{planned.kind}/{planned.fingerprint}"
        uses.note_use(self.store.objects, artifact, self.pipeline.name, planned.name)

    def check_start(self, plan: Plan) -> None:
        """Refuse at once what would stop a stage hours later.

        Resources that are not there, weights that do not fit, tracking that is away where it is required.
        """
        if plan.to_run and self.pipeline.tracking_required:
            self._require_tracking()
        stages = {planned.name: self.pipeline.stages[planned.name].stage for planned in plan.to_run}
        on_ray = [name for name, stage in stages.items() if stage.uses_ray]
        here = Place("this machine", [capacity.this_machine()])
        local = (self.address or os.environ.get("RAY_ADDRESS") or "local") == "local"
        checked_here = [name for name in stages if local or name not in on_ray]
        problems = list(capacity.lacking(self.pipeline, checked_here, here))
        for name, stage in stages.items() if not problems else ():
            for path, what, remedy in stage.obstacles(partial(self._remark, name)):
                problems.append(self.pipeline.problem(f"stages.{name}.{path}", what, remedy))
        asked = any(capacity.demand_of(self.pipeline, name, None) for name in on_ray)
        if on_ray and not problems and (asked or not local):  # a cluster that cannot be joined is said at once
            problems += capacity.lacking(self.pipeline, on_ray, self._ray().place)
        if problems:
            raise ConfigError(problems)

    def _require_tracking(self) -> None:
        if self.pipeline.tracking is None:
            remedy = "name a server or database, or leave tracking_required out"
            raise ConfigError([self.pipeline.problem("tracking_required", "tracking is null", remedy)])
        try:
            self.tracker.start(self.pipeline.name, self._tags(), required=True)
        except TrackingAway as error:
            remedy = "start it, or leave tracking_required out: then the run goes on untracked"
            raise ConfigError([self.pipeline.problem("tracking", str(error), remedy)]) from error

    def _tags(self) -> dict[str, str]:
        return {
            "tessera.pipeline": self.pipeline.name,
            "tessera.store": self.store.address,
            "tessera.file": str(self.pipeline.file),
        }

    def _remark(self, stage: str, text: str) -> None:
        self.display.say(f"{stage}: {text}")

    def _ray(self) -> Cluster:
        """The cluster of this run, started or joined by the first call."""
        if self.cluster is None:
            from pipeline.run import cluster

            self.cluster = cluster.start(self.address)
            self.display.say(f"on {self.cluster}")
        return self.cluster

    def skip(self, result: StageResult) -> bool:
        """Whether a stage cannot run because one that it needs has failed."""
        states = {stage.planned.name: stage.state for stage in self.result.stages}
        lost = [name for name in result.planned.inputs.values() if states.get(name) in ("failed", "skipped")]
        if lost:
            result.state, result.error = "skipped", f"it needs {', '.join(map(repr, dict.fromkeys(lost)))}"
        return bool(lost)

    def check_below(self, done: StageResult, plan: Plan) -> None:
        """Stop where what a finished artifact holds shows that a later stage cannot work.

        Without this, images without masks would be found out by an evaluation, after hours of training.
        """
        done.planned.artifact = done.artifact
        waiting = {stage.planned.name: stage for stage in self.result.stages if stage.state == "run"}
        problems = check_inputs(self.pipeline, plan.needed, set(waiting))
        for name, stage in waiting.items():
            own = [problem for problem in problems if problem.path.startswith(f"stages.{name}.")]
            if own:
                self._fail(stage, ConfigError(own if self.keep_going else problems))

    def _fail(self, result: StageResult, error: Exception) -> None:
        """Note that a stage has failed, and end the run unless it is to go on."""
        result.state, result.error = "failed", explain_in(self.pipeline, result.planned.name, error)
        failure = RunFailed(result.planned.name, result.error, error, self.result)
        if not self.keep_going:
            raise failure
        self.failures.append(failure)
        self.display.warn(f"{failure}")

    def execute(self, result: StageResult) -> None:
        """Compute one stage, unless another run has done so meanwhile: its lease makes a second run wait."""
        planned = result.planned
        started = time.monotonic()
        self.display.begin(planned.name, planned.reasons)
        try:
            with contextlib.ExitStack() as leases:
                for name in dict.fromkeys((planned.whole, planned.fingerprint)):  # they share their progress
                    leases.enter_context(self.store.lease(planned.kind, name, waiting=self._waiting))
                result.artifact = self._adopt(planned)
                result.state = "cached" if result.artifact else "failed"
                if result.artifact is None:
                    result.artifact = self._compute(planned)
                    result.state = "done"
        except Exception as error:
            if (stop := stopped_by(error)) is not None:
                raise stop from error
            self._fail(result, error)
        finally:
            result.seconds = time.monotonic() - started
            self.display.end(*_ending(result))

    def close(self, status: str) -> None:
        metrics = {
            f"{stage.planned.name}.{key}": value
            for stage in self.result.stages
            for key, value in (stage.results or {}).items()
        }
        self.tracker.finish(status, metrics)
        if self.tracker.run_id is not None:
            self.result.tracking = masked(self.tracker.uri or "")
        if self.cluster is not None:
            from pipeline.run import cluster

            cluster.stop(self.cluster, keep_logs=status == FAILED)

    def _waiting(self, holder: Holder) -> None:
        self.display.say(f"waiting for {holder}, which computes it already")

    def _adopt(self, planned: PlannedStage) -> Artifact | None:
        """The artifact, if another run has made it since the plan. A damaged one, and one to replace, is deleted."""
        try:
            artifact = self.store.find(planned.kind, planned.fingerprint)
        except ArtifactDamaged:
            self.store.discard(planned.kind, planned.fingerprint)
            return None
        if artifact is None:
            return None
        forced = "forced" in planned.reasons and artifact.manifest.created < self.began
        if forced or self.store.check(artifact):
            self.store.discard(planned.kind, planned.fingerprint)
            return None
        return artifact

    def _compute(self, planned: PlannedStage) -> Artifact:
        entry = self.pipeline.stages[planned.name]
        inputs = self._inputs(planned)
        if entry.stage.uses_ray:
            joined = self._ray()
            if demand := capacity.demand_of(self.pipeline, planned.name, joined.gpus):
                joined.wait_for(demand, self.display.say)
        settings = fingerprint.settings(entry.stage.config)
        tracked = self._track(planned, settings, inputs)
        status = FAILED
        try:
            artifact = self._write(planned, entry, inputs, settings, tracked)
            tracked.log_output(planned.name, artifact, entry.stage.tracked_as)
            status = FINISHED
        except BaseException as error:
            if not isinstance(error, Exception) or stopped_by(error) is not None:
                status = KILLED
            raise
        finally:
            tracked.finish(status)
        return artifact

    def _write(
        self,
        planned: PlannedStage,
        entry: PipelineStage,
        inputs: Mapping[str, Artifact],
        settings: dict[str, Any],
        tracked: StageTracker,
    ) -> Artifact:
        started, output = time.monotonic(), self.store.begin(planned.kind, planned.fingerprint, planned.whole)
        outcome: Outcome = entry.stage.run(
            Context(
                name=planned.name,
                fingerprint=planned.fingerprint,
                inputs=inputs,
                output=output,
                resources=entry.stage.config.resources,
                log_metrics=tracked.log_metrics,
                report_progress=self.display.progress,
                show_figures=self.display.figures,
                say=self.display.say,
            )
        )
        return output.commit(
            {
                "stage": planned.name,
                "uses": planned.uses,
                "version": entry.stage.version,
                "config": settings,
                "inputs": {path: f"{artifact.kind}/{artifact.fingerprint}" for path, artifact in inputs.items()},
                "sources": planned.sources,
                "counts": outcome.counts,
                "metrics": outcome.metrics,
                "problems": outcome.problems,
                "notes": outcome.notes,
                "preview": outcome.preview,
                "packages": package_versions(entry.stage.packages),
                "git": git_commit(),
                "made_by": uses.maker(self.pipeline.name),
                "created": _now(),
                "seconds": time.monotonic() - started,
                "tracking": {"uri": masked(self.tracker.uri or ""), "run": tracked.run_id} if tracked.run_id else {},
            }
        )

    def _inputs(self, planned: PlannedStage) -> dict[str, Artifact]:
        artifacts = {stage.planned.name: stage.artifact for stage in self.result.stages}
        inputs: dict[str, Artifact] = {}
        for path, name in planned.inputs.items():
            artifact = artifacts.get(name)
            if artifact is None:
                raise ArtifactMissing(f"input {path}: stage '{name}' has no artifact yet (run it too)")
            inputs[path] = artifact
        return inputs

    def _track(
        self, planned: PlannedStage, settings: Mapping[str, Any], inputs: Mapping[str, Artifact]
    ) -> StageTracker:
        self.tracker.start(self.pipeline.name, self._tags())
        tags = {
            **self._tags(),
            "tessera.stage": planned.name,
            "tessera.uses": planned.uses,
            "tessera.kind": planned.kind,
            "tessera.fingerprint": planned.fingerprint,
            "tessera.reasons": ", ".join(planned.reasons),
        }
        tracked = self.tracker.stage(planned.name, tags, settings)
        tracked.log_inputs(inputs, {path: (s["address"], s["digest"]) for path, s in planned.sources.items()})
        return tracked


def _ending(result: StageResult) -> tuple[str, str]:
    """The line that closes a stage, and its colour."""
    from pipeline.run.display import duration

    if result.state == "done" and result.artifact is not None:
        counts = ", ".join(f"{count} {name}" for name, count in result.artifact.manifest.counts.items())
        return f"done in {duration(result.seconds)}" + (f" ({counts})" if counts else ""), "green"
    if result.state == "cached":
        return "made by another run meanwhile", "green"
    return ("failed" if result.error else "stopped") + f" after {duration(result.seconds)}", "red"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
