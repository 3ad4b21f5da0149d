"""The trials of a sweep as the driver sees them: which comes next, what each has found, and when to give up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipeline.sweep.draw import draw
from pipeline.sweep.record import Records, Rung, Trial

if TYPE_CHECKING:
    from pipeline.sweep.design import Design

GIVE_UP = 3  # trials that fail before any has found something: then the others would fail too


class Ledger:
    """All trials of a sweep, known ones included. Whatever changes is written to the store at once.

    Args:
        design: of the sweep.
        records: of the sweep.
        changed: told about each trial that has a new rung, or has ended.
    """

    def __init__(self, design: Design, records: Records, changed: Callable[[Trial], None]) -> None:
        self.design, self.total = design, design.space.settings_to_try
        self._records, self._changed = records, changed
        self.trials = {trial.number: trial for trial in records.trials()}
        self.kept = [trial.number for trial in self.trials.values() if trial.over]
        self._waiting = [n for n in range(self.total) if n not in self.kept]
        for trial in self.trials.values():
            if not trial.over:  # interrupted, or failed: it begins again
                self.trials[trial.number] = Trial(trial.number, trial.values)

    @property
    def over(self) -> list[Trial]:
        """The trials that have ended well: finished, or stopped by the scheduler."""
        return [trial for trial in self.trials.values() if trial.over]

    @property
    def left(self) -> int:
        """Trials that have not begun."""
        return len(self._waiting)

    @property
    def failed(self) -> list[Trial]:
        """The trials that failed."""
        return [trial for trial in self.trials.values() if trial.state == "failed"]

    @property
    def hopeless(self) -> bool:
        """Whether the first trials have all failed."""
        return len(self.failed) >= min(GIVE_UP, self.total) and not any(t.rungs for t in self.trials.values())

    def next_trial(self) -> Trial | None:
        """Begin the next trial; None when all have begun. One that was interrupted keeps its values."""
        if not self._waiting:
            return None
        number = self._waiting.pop(0)
        before = self.trials.get(number)
        others = [trial for trial in self.trials.values() if trial.number != number]
        values = before.values if before is not None else draw(self.design.space, self.design.mode, number, others)
        trial = self.trials[number] = Trial(number, values)
        self._records.keep(trial)
        return trial

    def add(self, number: int, rung: Rung) -> None:
        """A trial has finished a rung. One that it had finished before it lost its process counts once."""
        trial = self.trials[number]
        if all(other.index != rung.index for other in trial.rungs):
            trial.rungs.append(rung)
            if rung.steps is None:
                trial.state = "finished"
            self._records.keep(trial)
            self._changed(trial)

    def stop(self, number: int) -> None:
        """The scheduler has ended a trial early."""
        self._end(number, "stopped")

    def fail(self, number: int, error: str, trace: str = "") -> None:
        """A trial cannot go on."""
        trial = self.trials[number]
        trial.error, trial.trace = error, trace
        self._end(number, "failed")

    def warn(self, number: int, warnings: list[str]) -> None:
        """What the stages of a trial warned of."""
        trial = self.trials[number]
        trial.warnings = list(dict.fromkeys([*trial.warnings, *warnings]))

    def best(self) -> Trial | None:
        """The finished trial with the best objective."""
        finished = [trial for trial in self.trials.values() if trial.state == "finished"]
        return min(finished, key=self._order, default=None)

    def ranked(self) -> list[Trial]:
        """Finished trials, the best first; then those that were stopped, the farthest first; then the others."""
        return sorted(self.trials.values(), key=self._order)

    def _order(self, trial: Trial) -> tuple[Any, ...]:
        place = {"finished": 0, "stopped": 1, "running": 2, "failed": 3}[trial.state]
        value = trial.rungs[-1].value if trial.rungs else math.inf
        sign = -1 if self.design.mode == "max" and trial.rungs else 1
        return place, -trial.rungs[-1].index if trial.rungs else 0, sign * value, trial.number

    def _end(self, number: int, state: Any) -> None:
        trial = self.trials[number]
        if trial.state == "running":
            trial.state = state
            self._records.keep(trial)
            self._changed(trial)
