"""What the terminal shows during a run: bars and lines, on standard error, because standard output is for results."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining

if TYPE_CHECKING:
    from types import TracebackType


LINE_EVERY = 15.0  # seconds between two progress lines where there is no terminal to draw a bar on


class RunDisplay:
    """Bars and lines of a working run, on standard error: a bar for each stage at work. Use as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._progress: Progress | None = None
        self._watched: StageDisplay | None = None

    def __enter__(self) -> RunDisplay:
        if self._console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            unit, figures = TextColumn("{task.fields[unit]}"), TextColumn("{task.fields[figures]}")
            self._progress = Progress(
                *columns, unit, figures, TimeElapsedColumn(), Remaining(), console=self._console, transient=True
            )
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def begin(self, stage: str, reasons: Sequence[str] = ()) -> StageDisplay:
        """A stage starts."""
        self.line(f"[bold]{escape(stage)}[/]" + (f": {escape(', '.join(reasons))}" if reasons else ""))
        return StageDisplay(self, stage, self._progress)

    def watch(self, title: str, done: float, total: float, unit: str) -> None:
        """How far work is that belongs to no stage; its bar is shown only while it lasts."""
        if self._watched is None or self._watched.name != title:
            if self._watched is not None:
                self._watched.close()
            self._watched = StageDisplay(self, title, self._progress)
        self._watched.progress(done, total, unit)

    def say(self, text: str) -> None:
        """A remark on the run."""
        self.line(escape(text))

    def warn(self, text: str) -> None:
        """Something that the user should know, and that does not stop the run."""
        self.line(f"[yellow]warning:[/] {escape(text)}")

    def line(self, markup: str) -> None:
        """One line of rich markup."""
        self._console.print(markup, highlight=False, soft_wrap=True)


class StageDisplay:
    """The bar and the lines of one stage at work; several may be at work at the same time, each in a thread."""

    def __init__(self, run: RunDisplay, name: str, progress: Progress | None) -> None:
        self.name, self._run, self._progress = name, run, progress
        self._figures = ""
        self._started = self._line_at = time.monotonic()
        self._task: TaskID | None = None
        if progress is not None:
            self._task = progress.add_task(escape(name), total=None, unit="", figures="")

    def progress(self, done: float, total: float, unit: str) -> None:
        """How far the stage is; a `total` of 0 means that it is not known."""
        if self._progress is not None and self._task is not None:
            with contextlib.suppress(KeyError):  # its bar is gone: a late word of a stage that was stopped
                self._progress.update(
                    self._task, completed=int(done), total=int(total) or None, unit=unit, figures=self._figures
                )
        elif self._progress is None and time.monotonic() - self._line_at >= LINE_EVERY:
            self._line_at = time.monotonic()
            figures = f"{self._figures}, " if self._figures else ""
            self.say(f"{done:g} of {total:g} {unit}, {figures}{duration(self._line_at - self._started)}")

    def figures(self, text: str) -> None:
        """A few words that stand beside the progress from now on, such as "loss 2.31"."""
        self._figures = escape(text)

    def say(self, text: str) -> None:
        """A remark of the stage at work; its name in front of it is said once."""
        text = text.removeprefix(f"{self.name}: ")
        self._run.line(f"  {escape(self.name)}: {escape(text)}")

    def end(self, outcome: str, style: str = "green") -> None:
        """The stage has ended."""
        self.close()
        self._run.line(f"[bold]{escape(self.name)}[/]: [{style}]{escape(outcome)}[/]")

    def close(self) -> None:
        """Take its bar away."""
        if self._progress is not None and self._task is not None:
            self._progress.remove_task(self._task)
        self._task = None


@contextlib.contextmanager
def results_only_on_stdout() -> Iterator[None]:
    """Send what Ray, libraries and child processes print meanwhile to standard error."""
    sys.stdout.flush()
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # not a file: a test, a notebook
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    kept = os.dup(descriptor)
    os.dup2(2, descriptor)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, descriptor)
        os.close(kept)


def duration(seconds: float) -> str:
    """A time for people: 3.2 s, 4 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def size(count: float) -> str:
    """A number of bytes for people: 512 B, 3.4 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
