"""What the terminal shows of a sweep: one line for each finished rung and, on a terminal, a bar of the trials."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from pipeline.run.display import RunDisplay, duration
from pipeline.sweep.leaderboard import figure

if TYPE_CHECKING:
    from rich.progress import TaskID

    from pipeline.sweep.ledger import Ledger
    from pipeline.sweep.record import Trial


class SweepDisplay(RunDisplay):
    """A run's display, for the stages that trials share, and the lines of trials."""

    def __init__(self) -> None:
        super().__init__()
        self._warned: set[str] = set()
        self._task: TaskID | None = None

    def __enter__(self) -> SweepDisplay:
        super().__enter__()
        return self

    def trials_begin(self, ledger: Ledger) -> None:
        """The stages that trials share are there."""
        if self._progress is not None:
            self._task = self._progress.add_task(
                "trials", total=ledger.total, completed=len(ledger.over), unit="", figures=""
            )

    def trial(self, trial: Trial, ledger: Ledger) -> None:
        """A trial has finished a rung, or has ended."""
        name = f"[bold]trial {trial.number}[/]"
        for text in trial.warnings:
            if text not in self._warned:  # the trials of a sweep warn of the same
                self._warned.add(text)
                self.line(f"{name}: [yellow]warning:[/] {escape(text)}")
        if trial.state == "failed":
            self.line(f"{name}: [red]failed:[/] {escape(trial.error)}")
        elif trial.state == "stopped":
            self.line(f"{name}: stopped by the scheduler")
        else:
            rung = trial.rungs[-1]
            where = "end" if rung.steps is None else f"step {rung.steps}"
            found = f"{ledger.design.space.objective} {figure(rung.value, rung.spread)}"
            took = duration(rung.seconds) if rung.stages else "from the cache"
            self.line(f"{name}, {where}: {escape(found)} ({took}){self._beside(trial, ledger)}")
        if self._progress is not None and self._task is not None:
            ended = len(ledger.over) + len(ledger.failed)
            self._progress.update(self._task, completed=ended, figures=self._beside(None, ledger).removeprefix("; "))

    def _beside(self, trial: Trial | None, ledger: Ledger) -> str:
        best = ledger.best()
        if best is None:
            return ""
        if best is trial:
            return "; the best so far"
        last = best.rungs[-1]
        return f"; best: {figure(last.value, last.spread)} (trial {best.number})"
