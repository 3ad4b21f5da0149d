"""A trial in its own process: Ray Tune asks for one rung after another, each a run of the pipeline with its settings.

The process stays for the trials that come after, so that torch is imported once for each place, not for each trial.
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from ray import tune

from pipeline.errors import StageFailed, TesseraError
from pipeline.run import runner
from pipeline.run.display import RunDisplay
from pipeline.run.failure import RunFailed, explain
from pipeline.sweep.design import Design, Setting
from pipeline.sweep.record import Rung
from pipeline.sweep.slots import as_trial

if TYPE_CHECKING:
    from pipeline.store.store import ArtifactStore

OBJECTIVE, PROGRESS = "objective", "progress"  # what the scheduler compares, and its measure of how far a trial is
REPORT, ENDED, FAILED, TRACE, WARNINGS = "report", "ended", "failed", "trace", "warnings"


class SilentDisplay(RunDisplay):
    """Shows nothing, because several trials work at once; keeps what the user should know."""

    def __init__(self) -> None:
        super().__init__()
        self.warnings: list[str] = []

    def __enter__(self) -> SilentDisplay:
        return self

    def line(self, markup: str) -> None:
        """Nothing."""

    def progress(self, done: float, total: float, unit: str) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Keep a warning."""
        self.warnings.append(text)


class TrialProcess(tune.Trainable):
    """What Ray Tune runs. `step` is one rung."""

    end: Rung | None  # of a trial that is in the store as a whole

    def setup(self, config: dict[str, Any], design: Design, store: ArtifactStore, name: str) -> None:
        """Called once a process; `reset_config` at every further trial."""
        self.design, self.store, self.name = design, store, name
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another trial in the same process."""
        self.values: dict[str, Any] = json.loads(new_config["values"])
        self.at, self.end = 0, None
        return True

    def step(self) -> dict[str, Any]:
        """The next rung: what it found, or why the trial failed."""
        display = SilentDisplay()
        try:
            found = self._next_rung(display)
        except Exception as error:  # the other trials go on, in this process too
            trace = "" if _on_purpose(error) else traceback.format_exc()
            text = str(error) if isinstance(error, TesseraError) else explain(error)
            failed = {FAILED: text, TRACE: trace, OBJECTIVE: math.nan, PROGRESS: 0.0}
            return {**failed, WARNINGS: json.dumps(display.warnings), "done": True}
        self.at = found.index + 1
        return {
            OBJECTIVE: found.value,
            PROGRESS: progress(self.design, found.index),
            REPORT: json.dumps(asdict(found)),
            WARNINGS: json.dumps(display.warnings),
            ENDED: found.steps is None,
            "done": found.steps is None,
        }

    def _next_rung(self, display: SilentDisplay) -> Rung:
        last = len(self.design.rungs) - 1
        if self.at == 0:
            self.end = known_rung(self.design, self.store, self.values, last)
        if self.end is not None:  # the whole trial is in the store: of its rungs, too, nothing is computed
            known = (known_rung(self.design, self.store, self.values, index) for index in range(self.at, last))
            return next((rung for rung in known if rung is not None), self.end)
        return look(self.design, self.store, self.values, self.at, self.name, display)


def progress(design: Design, rung: int) -> float:
    """How far a trial is at a rung, for schedulers: Tune's ASHA compares trials at powers of its reduction factor."""
    return float(design.space.reduction**rung)


def known_rung(design: Design, store: ArtifactStore, values: Mapping[str, Any], index: int) -> Rung | None:
    """A rung whose objective is in the store for every seed; None for any other."""
    found, artifacts = [], []
    for seed in design.seeds:
        _, plan = design.plan(Setting(values, seed, design.rungs[index]), store)
        artifact = plan.needed[design.stage].artifact
        if artifact is None:
            return None
        found.append(_objective(design, artifact.manifest.metrics))
        artifacts.append(artifact.name)
    return Rung(index, design.rungs[index], found, artifacts=artifacts)


def look(
    design: Design, store: ArtifactStore, values: Mapping[str, Any], index: int, name: str, display: RunDisplay
) -> Rung:
    """Run the pipeline up to a rung, with every seed, and read the objective.

    Args:
        design: of the sweep.
        store: where the artifacts are.
        values: of the trial.
        index: of the rung.
        name: under which the trials' artifacts are used.
        display: gets what the stages say.

    Raises:
        TesseraError: a stage failed, or did not report the objective.
    """
    began, found = time.monotonic(), Rung(index, design.rungs[index], [], stages={})
    seconds: dict[str, float] = {}
    for seed in design.seeds:
        pipeline, plan = design.plan(Setting(values, seed, design.rungs[index]), store)
        artifact = plan.needed[design.stage].artifact
        if artifact is None:
            result = runner.run(as_trial(pipeline, name), plan, store, display)
            for stage in result.stages:
                if stage.state == "done":
                    seconds[stage.planned.name] = seconds.get(stage.planned.name, 0.0) + stage.seconds
            artifact = next(stage.artifact for stage in result.stages if stage.planned.name == design.stage)
        assert artifact is not None
        found.by_seed.append(_objective(design, artifact.manifest.metrics))
        found.artifacts.append(artifact.name)
    return replace(found, seconds=time.monotonic() - began, stages=seconds)


def _objective(design: Design, metrics: Mapping[str, float]) -> float:
    value = metrics.get(design.metric)
    if value is None:
        there = ", ".join(metrics) or "none"
        raise StageFailed(f"'{design.stage}' reported no metric {design.metric!r} (its metrics: {there})")
    if not math.isfinite(value):
        raise StageFailed(f"{design.stage}.{design.metric} is {value}, which cannot be compared")
    return value


def _on_purpose(error: Exception) -> bool:
    return not error.is_bug if isinstance(error, RunFailed) else isinstance(error, TesseraError)
