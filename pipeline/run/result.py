"""How a run ended, stage by stage: what the terminal's tables, `--json` and errors are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.plan.plan import PlannedStage
    from pipeline.store.artifact import Artifact


@dataclass
class StageResult:
    """How one stage of a run ended. `shows_metrics` and `units` are its type's."""

    planned: PlannedStage
    shows_metrics: bool
    units: Mapping[str, str]  # of its metrics
    state: str  # "cached", "done", "failed", "skipped" (it needs one that failed), "run" (the run stopped before it)
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
