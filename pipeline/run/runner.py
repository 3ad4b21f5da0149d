"""Executes a plan: all that is not cached, each stage from finished artifacts to one committed artifact.

Ray, MLflow and everything heavy are imported and started with the first stage that has to run: a pipeline that is all
cached takes the time of its plan. What was committed stays committed, however the run ends. schedule.py decides which
stages run at the same time, execution.py computes one.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError
from pipeline.plan import history
from pipeline.plan.plan import check_inputs
from pipeline.run import capacity
from pipeline.run.capacity import Place
from pipeline.run.execution import Executor
from pipeline.run.mirrors import require_installed
from pipeline.run.result import RunResult, StageResult
from pipeline.run.schedule import Schedule
from pipeline.run.tracking import FAILED, FINISHED, KILLED, Tracker, TrackingAway, masked
from pipeline.store import uses

if TYPE_CHECKING:
    from pipeline.config.load import Pipeline
    from pipeline.plan.plan import Plan, PlannedStage
    from pipeline.run.cluster import Cluster
    from pipeline.run.display import RunDisplay
    from pipeline.store.store import ArtifactStore


def run(
    pipeline: Pipeline,
    plan: Plan,
    store: ArtifactStore,
    display: RunDisplay,
    *,
    address: str | None = None,
    keep_going: bool = False,
    parallel: int | None = None,
) -> RunResult:
    """Execute what the plan says must run. Every artifact that is committed stays, whatever happens later.

    Args:
        pipeline: as loaded.
        plan: of this pipeline.
        store: where its artifacts are.
        display: shows the progress.
        address: of a Ray cluster; without one a local Ray is started.
        keep_going: when a stage fails, still run the stages that do not need it.
        parallel: stages at the same time, at most; default: as many as there is room for.

    Raises:
        ConfigError: a stage cannot run on this machine or cluster; nothing was started.
        RunFailed: a stage failed; those that ran beside it were finished.
        StagesFailed: several stages failed, or with `keep_going` at least one.
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
            working.check_start(plan)
            working.compute(plan, keep_going, parallel)
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
        self.tracker = Tracker(pipeline.tracking, pipeline.name, display.warn, pipeline.mirrors)
        self.executor = Executor(pipeline, store, self.result, self.tracker, self._tags())
        self.cluster: Cluster | None = None
        self.left_threads = False

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
            remedy = "start it, or leave tracking_required out: then the run keeps its records and sends them later"
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

    def compute(self, plan: Plan, keep_going: bool, parallel: int | None) -> None:
        """Run the stages that are not cached."""

        def made(result: StageResult) -> None:
            result.planned.artifact = result.artifact
            self.remember(result.planned)

        schedule = Schedule(
            self.pipeline,
            self.result,
            self.executor,
            self.display,
            cluster=self._ray,
            made=made,
            # What a finished artifact holds may show that a later stage cannot work. Without this, images without
            # masks would be found out by an evaluation, after hours of training.
            check=lambda names: check_inputs(self.pipeline, plan.needed, names),
            keep_going=keep_going,
            parallel=parallel,
        )
        try:
            schedule.run()
        finally:
            self.left_threads = schedule.left_threads

    def close(self, status: str) -> None:
        """End the run's page in MLflow, and leave the cluster."""
        metrics = {
            f"{stage.planned.name}.{key}": value
            for stage in self.result.stages
            for key, value in (stage.results or {}).items()
        }
        self.tracker.finish(status, metrics)
        if self.tracker.record_id is not None:
            self.result.tracking = masked(self.tracker.uri or "")
        if self.cluster is not None and not self.left_threads:  # they use Ray: it ends with this process
            from pipeline.run import cluster

            cluster.stop(self.cluster, keep_logs=status == FAILED)
