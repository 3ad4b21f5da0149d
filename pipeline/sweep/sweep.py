"""A sweep from its beginning to its end: what all trials share once, then the trials on Ray Tune, then the result."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.errors import StageFailed
from pipeline.run import runner
from pipeline.run.mirrors import require_installed
from pipeline.run.tracking import FAILED, FINISHED, KILLED, Tracker
from pipeline.sweep import leaderboard
from pipeline.sweep.ledger import Ledger
from pipeline.sweep.prepare import Prepared, check_values
from pipeline.sweep.publish import Publisher, files
from pipeline.sweep.record import FOLDER, Records, Trial

if TYPE_CHECKING:
    from pipeline.run.cluster import Cluster
    from pipeline.store.lease import Holder
    from pipeline.store.store import ArtifactStore
    from pipeline.sweep.display import SweepDisplay
    from pipeline.sweep.space import SpaceFile


@dataclass
class SweepResult:
    """How a sweep ended."""

    prepared: Prepared
    ledger: Ledger
    files: dict[str, bytes]
    seconds: dict[str, float] = field(default_factory=dict)  # of its phases: shared, start, trials, end
    slots: int = 0  # trials at once; 0 when none was run

    def to_json(self) -> dict[str, Any]:
        """What `tessera sweep --json` prints."""
        best = self.ledger.best()
        return {
            "sweep": self.prepared.sweep,
            "name": self.prepared.name,
            "objective": self.ledger.design.space.objective,
            "mode": self.ledger.design.mode,
            "best": best.number if best else None,
            "trials": leaderboard.rows(self.ledger),
            "kept": self.ledger.kept,
            "shared": self.prepared.shared,
            "remark": leaderboard.remark(self.ledger),
            "slots": self.slots,
            "seconds": {phase: round(seconds, 2) for phase, seconds in self.seconds.items()},
        }


class AllFailed(StageFailed):
    """No trial of a sweep has come to a result."""

    def __init__(self, result: SweepResult) -> None:
        self.result = result
        failed = result.ledger.failed
        causes = list(dict.fromkeys(trial.error for trial in failed))
        more = f", and {len(causes) - 1} other reasons (`--json` has them)" if len(causes) > 1 else ""
        super().__init__(
            f"{len(failed)} of {result.ledger.total} trials failed, and none came to a result: {causes[0]}{more}"
        )


def run_sweep(
    prepared: Prepared, file: SpaceFile, store: ArtifactStore, display: SweepDisplay, *, address: str | None = None
) -> SweepResult:
    """Run what is left of a sweep.

    Args:
        prepared: what to run.
        file: of the space, for errors.
        store: where artifacts and records are.
        display: shows the progress.
        address: of a Ray cluster; without one a local Ray is started.

    Raises:
        ConfigError: shared artifacts do not suit a value, or the cluster has no room for a trial.
        RunFailed: a stage that all trials share failed.
        AllFailed: every trial failed.
        KeyboardInterrupt, SystemExit: the sweep was interrupted.
    """
    design = prepared.design

    def waiting(holder: Holder) -> None:
        display.say(f"waiting for {holder}, which runs this sweep already")

    with store.lease(FOLDER, prepared.sweep, waiting):
        records = Records(store, prepared.sweep, design.pipeline.name)
        other = records.begin(design.space.identity)
        if other:
            display.say(
                f"another sweep than the last one of {design.pipeline.name} ({', '.join(other[:4])}"
                f"{', ...' if len(other) > 4 else ''}): its trials begin anew; what is equal comes from the cache"
            )
        elif other is not None:
            display.say(f"another sweep than the last one of {design.pipeline.name}: the pipeline has changed")
        return _Sweep(prepared, file, store, display, address, records).run()


class _Sweep:
    def __init__(
        self,
        prepared: Prepared,
        file: SpaceFile,
        store: ArtifactStore,
        display: SweepDisplay,
        address: str | None,
        records: Records,
    ) -> None:
        self.prepared, self.file, self.store, self.display, self.address = prepared, file, store, display, address
        pipeline = prepared.design.pipeline
        self.ledger = Ledger(prepared.design, records, self.changed)
        self.tracker = Tracker(pipeline.tracking, pipeline.name, display.warn)
        self.publisher = Publisher(prepared, self.ledger, self.tracker)
        self.result = SweepResult(prepared, self.ledger, {})
        self.cluster: Cluster | None = None
        self.clock = time.monotonic()

    def run(self) -> SweepResult:
        if self.ledger.kept:
            self.display.say(f"{len(self.ledger.kept)} of {self.ledger.total} trials were finished before: kept")
        status = FAILED
        try:
            if self.prepared.base.tracking_required:
                self.publisher.start(required=True)
            if self.ledger.left:
                self.run_shared()
                self.run_trials()
            status = FINISHED if self.ledger.best() else FAILED
        except BaseException as error:
            status = FAILED if isinstance(error, Exception) else KILLED
            raise
        finally:
            self.close(status)
        if not self.ledger.over:
            raise AllFailed(self.result)
        return self.result

    def changed(self, trial: Trial) -> None:
        self.display.trial(trial, self.ledger)
        self.publisher.trial(trial)

    def run_shared(self) -> None:
        """Compute what all trials have in common, as a run of the pipeline itself."""
        plan = self.prepared.shared_plan(self.store)
        if plan is not None:
            require_installed(self.prepared.base.mirrors)
            if any(self.prepared.base.stages[planned.name].stage.uses_ray for planned in plan.to_run):
                self.connect()  # one Ray for this and for the trials
            runner.run(self.prepared.base, plan, self.store, self.display, address=self.address)
            check_values(self.prepared, self.file, self.store)
        self.phase("shared")

    def run_trials(self) -> None:
        cluster = self.connect()
        from pipeline.sweep.on_tune import run_trials
        from pipeline.sweep.slots import make_slots

        design = self.prepared.design
        slots = make_slots(
            self.prepared.base, self.prepared.own, cluster.machines, self.ledger.left, design.space.concurrent
        )
        self.result.slots = slots.count
        self.display.trials_begin(self.ledger)
        self.display.say(f"{self.ledger.left} trials on {cluster.where}, {slots}")
        self.phase("start")
        run_trials(design, self.store, self.ledger, slots, self.prepared.name, self.publisher.start)
        self.phase("trials")

    def connect(self) -> Cluster:
        from pipeline.run import cluster

        if self.cluster is None:
            self.cluster = cluster.start(self.address)
        return self.cluster

    def close(self, status: str) -> None:
        if status != KILLED and self.ledger.over:
            self.result.files = files(self.prepared, self.ledger)
            self.publisher.start()
        self.publisher.finish(status, self.result.files)
        if self.cluster is not None:
            from pipeline.run import cluster

            cluster.stop(self.cluster, keep_logs=status == FAILED)
        self.phase("end")

    def phase(self, name: str) -> None:
        now = time.monotonic()
        self.result.seconds[name] = self.result.seconds.get(name, 0.0) + now - self.clock
        self.clock = now
