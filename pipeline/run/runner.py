"""Executes a plan: stage after stage, each from finished artifacts to one committed artifact.

Ray, MLflow and everything heavy are imported and started with the first stage that has to run: a pipeline that is all
cached takes the time of its plan. What was committed stays committed, however the run ends.
"""

from __future__ import annotations

import contextlib
import datetime
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.errors import ArtifactDamaged, ArtifactMissing, ConfigError, StageFailed, TesseraError
from pipeline.plan import fingerprint, history
from pipeline.plan.plan import check_inputs
from pipeline.run.mirrors import require_installed
from pipeline.run.provenance import git_commit, package_versions
from pipeline.run.tracking import FAILED, FINISHED, KILLED, StageTracker, Tracker, masked
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


@dataclass
class StageResult:
    """How one stage of a run ended. `shows_metrics` and `units` are its type's."""

    planned: PlannedStage
    shows_metrics: bool
    units: Mapping[str, str]  # of its metrics
    state: str  # "cached", "done", "failed"; "run" where the run stopped before it
    seconds: float = 0.0
    artifact: Artifact | None = None
    error: str | None = None

    @property
    def results(self) -> dict[str, float] | None:
        """The artifact's metrics, where the stage says that they are results of the run."""
        return dict(self.artifact.manifest.metrics) if self.shows_metrics and self.artifact is not None else None

    def to_json(self) -> dict[str, Any]:
        """One entry of `stages` in what `tessera run --json` prints."""
        planned = self.planned
        row: dict[str, Any] = {
            "name": planned.name,
            "uses": planned.uses,
            "kind": planned.kind,
            "fingerprint": planned.fingerprint,
            "state": self.state,
            "reasons": list(planned.reasons),
            "inputs": dict(planned.inputs),
            "seconds": round(self.seconds, 3),
            "artifact": self.artifact.address if self.artifact else None,
        }
        if self.results is not None:
            row["metrics"], row["units"] = self.results, dict(self.units)
        if self.error is not None:
            row["error"] = self.error
        return row


@dataclass
class RunResult:
    """How a run ended, stage by stage in execution order."""

    pipeline: str
    stages: list[StageResult] = field(default_factory=list)
    tracking: str | None = None  # the address, when the run was tracked
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """What `tessera run --json` prints."""
        return {
            "pipeline": self.pipeline,
            "stages": [stage.to_json() for stage in self.stages],
            "seconds": round(self.seconds, 3),
            "tracking": self.tracking,
        }


class RunFailed(StageFailed):
    """A stage stopped the run. `result` says how far the run came, and `__cause__` is the stage's error."""

    def __init__(self, stage: str, cause: BaseException, result: RunResult) -> None:
        self.stage, self.result = stage, result
        self.is_bug = on_purpose(cause) is None  # then the user needs the traceback
        super().__init__(f"stage '{stage}' failed: {explain(cause)}")


def run(
    pipeline: Pipeline, plan: Plan, store: ArtifactStore, display: RunDisplay, *, address: str | None = None
) -> RunResult:
    """Execute what the plan says must run. Every artifact that is committed stays, whatever happens later.

    Args:
        pipeline: as loaded.
        plan: of this pipeline.
        store: where its artifacts are.
        display: shows the progress.
        address: of a Ray cluster; without one a local Ray is started.

    Raises:
        RunFailed: a stage failed.
        UsageError: a mirror's package is not installed.
        KeyboardInterrupt, SystemExit: the run was interrupted.
    """
    started = time.monotonic()
    if plan.to_run:
        require_installed(pipeline.mirrors)
    working = _Run(pipeline, store, display, address)
    for planned in plan.stages:
        stage = pipeline.stages[planned.name].stage
        working.result.stages.append(
            StageResult(planned, stage.shows_metrics, stage.units, planned.state, artifact=planned.artifact)
        )
    status = FAILED
    try:
        with working.claimed(plan):
            for result in working.result.stages:
                if result.state == "run":
                    working.execute(result)
                    working.check_below(result, plan)
                    working.remember(result.planned)
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

    def __init__(self, pipeline: Pipeline, store: ArtifactStore, display: RunDisplay, address: str | None) -> None:
        self.pipeline, self.store, self.display, self.address = pipeline, store, display, address
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

    def check_below(self, done: StageResult, plan: Plan) -> None:
        """Stop where what a finished artifact holds shows that a stage which reads it cannot work.

        Without this, images without masks would be found out by an evaluation, after hours of training.
        """
        done.planned.artifact = done.artifact
        readers = {stage.planned.name for stage in self.result.stages if stage.state == "run"}
        readers = {name for name in readers if done.planned.name in plan.needed[name].inputs.values()}
        if problems := check_inputs(self.pipeline, plan.needed, readers):
            error = ConfigError(problems)
            name = problems[0].path.split(".")[1]
            failed = next(stage for stage in self.result.stages if stage.planned.name == name)
            failed.state, failed.error = "failed", str(error)
            raise RunFailed(name, error, self.result)

    def execute(self, result: StageResult) -> None:
        """Compute one stage, unless another run has done so meanwhile: its lease makes a second run wait."""
        planned = result.planned
        started = time.monotonic()
        self.display.begin(planned.name, planned.reasons)
        try:
            with self.store.lease(planned.kind, planned.fingerprint, waiting=self._waiting):
                result.artifact = self._adopt(planned)
                result.state = "cached" if result.artifact else "failed"
                if result.artifact is None:
                    result.artifact = self._compute(planned)
                    result.state = "done"
        except Exception as error:
            if (stop := stopped_by(error)) is not None:
                raise stop from error
            result.state, result.error = "failed", explain(error)
            raise RunFailed(planned.name, error, self.result) from error
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
        if entry.stage.uses_ray and self.cluster is None:
            from pipeline.run import cluster

            self.cluster = cluster.start(self.address)
            self.display.say(f"on {self.cluster}")
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
        started, output = time.monotonic(), self.store.begin(planned.kind, planned.fingerprint)
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
        common = {"tessera.pipeline": self.pipeline.name, "tessera.store": self.store.address}
        self.tracker.start(self.pipeline.name, {**common, "tessera.file": str(self.pipeline.file)})
        tags = {
            **common,
            "tessera.stage": planned.name,
            "tessera.uses": planned.uses,
            "tessera.kind": planned.kind,
            "tessera.fingerprint": planned.fingerprint,
            "tessera.reasons": ", ".join(planned.reasons),
        }
        tracked = self.tracker.stage(planned.name, tags, settings)
        tracked.log_inputs(inputs, {path: (s["address"], s["digest"]) for path, s in planned.sources.items()})
        return tracked


def stopped_by(error: BaseException) -> BaseException | None:
    """The interrupt behind an error; None when there is none.

    When Ray receives the same Ctrl-C or SIGTERM, cleaning up raises other errors on top of it.
    """
    while (error.__context__ or error.__cause__) is not None:
        error = error.__context__ or error.__cause__  # type: ignore[assignment]
        if isinstance(error, KeyboardInterrupt | SystemExit):
            return error
    return None


def on_purpose(error: BaseException) -> TesseraError | None:
    """The TesseraError that a stage raised, also where Ray has wrapped it; None for a bug."""
    if isinstance(getattr(error, "cause", None), BaseException):  # Ray's wrapper, which has its cause's type too
        return on_purpose(error.cause)  # type: ignore[attr-defined]
    if isinstance(error, TesseraError):
        return error
    return on_purpose(error.__cause__) if error.__cause__ is not None else None


def explain(error: BaseException) -> str:
    """What stopped a stage, in one sentence: the error's own message, or the first line of a bug's."""
    if (known := on_purpose(error)) is not None:
        return str(known)
    while isinstance(cause := getattr(error, "cause", None), BaseException):
        error = cause
    return "".join(traceback.format_exception_only(error)).strip().split("\n")[0]


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
