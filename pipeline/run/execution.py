"""One stage of a run: from finished artifacts to one committed artifact, with its nested run in MLflow."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.errors import ArtifactDamaged, ArtifactMissing
from pipeline.plan import fingerprint
from pipeline.run import capacity
from pipeline.run.failure import stopped_by
from pipeline.run.provenance import git_commit, package_versions
from pipeline.run.tracking import FAILED, FINISHED, KILLED, StageTracker, Tracker
from pipeline.stage import Context, Outcome
from pipeline.store import uses

if TYPE_CHECKING:
    from pipeline.config.load import Pipeline, PipelineStage
    from pipeline.plan.plan import PlannedStage
    from pipeline.run.cluster import Cluster
    from pipeline.run.display import StageDisplay
    from pipeline.run.result import RunResult
    from pipeline.store.artifact import Artifact
    from pipeline.store.store import ArtifactStore


class Executor:
    """Computes stages of one run; several threads may each compute one at the same time.

    Args:
        pipeline: as loaded.
        store: where its artifacts are.
        result: of the run, with the artifacts so far.
        tracker: of the run.
        tags: of the run's pages in MLflow.
    """

    def __init__(
        self, pipeline: Pipeline, store: ArtifactStore, result: RunResult, tracker: Tracker, tags: Mapping[str, str]
    ) -> None:
        self.pipeline, self.store, self.result = pipeline, store, result
        self.tracker, self.tags = tracker, tags

    def adopt(self, planned: PlannedStage) -> Artifact | None:
        """The artifact, if another run has made it since the plan. A damaged one, and one to replace, is deleted."""
        try:
            artifact = self.store.find(planned.kind, planned.fingerprint)
        except ArtifactDamaged:
            self.store.discard(planned.kind, planned.fingerprint)
            return None
        if artifact is None:
            return None
        forced = "forced" in planned.reasons and artifact.manifest.attempt == planned.replaces
        if forced or self.store.check(artifact):
            self.store.discard(planned.kind, planned.fingerprint)
            return None
        return artifact

    def compute(self, planned: PlannedStage, shown: StageDisplay, cluster: Cluster | None) -> Artifact:
        """Run the stage and commit its artifact; the caller holds its lease.

        Args:
            planned: the stage.
            shown: its place on the screen.
            cluster: where it runs; None for a stage in this process.
        """
        entry = self.pipeline.stages[planned.name]
        inputs = self._inputs(planned)
        if cluster is not None and (demand := capacity.demand_of(self.pipeline, planned.name, cluster.gpus)):
            cluster.wait_for(demand, shown.say)
        settings = fingerprint.settings(entry.stage.config)
        tracked = self._track(planned, settings, inputs)
        status = FAILED
        try:
            artifact = self._write(planned, entry, inputs, settings, tracked, shown)
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
        shown: StageDisplay,
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
                report_progress=shown.progress,
                show_figures=shown.figures,
                say=shown.say,
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
                "created": now(),
                "seconds": time.monotonic() - started,
                "tracking": tracked.reference,
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
        tags = {
            **self.tags,
            "tessera.stage": planned.name,
            "tessera.uses": planned.uses,
            "tessera.kind": planned.kind,
            "tessera.fingerprint": planned.fingerprint,
            "tessera.reasons": ", ".join(planned.reasons),
        }
        self.tracker.start(self.pipeline.name, self.tags)
        tracked = self.tracker.stage(planned.name, tags, settings)
        tracked.log_inputs(inputs, {path: (s["address"], s["digest"]) for path, s in planned.sources.items()})
        return tracked


def now() -> str:
    """The time for a manifest: ISO 8601, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
