"""Between the training workers and the driver: rows of the curves, and why training had to stop.

Imports neither torch nor Ray: the relay runs in a process of its own, which should start fast.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.stage import Context


class CurveLog:
    """Passes each row of the curves on to the progress bar and to MLflow, once, whoever sends it how often."""

    def __init__(self, context: Context) -> None:
        self.context, self.total = context, 0
        self.seen: set[float] = set()

    def add(self, row: dict[str, float]) -> None:
        """One row; "step" is among its keys."""
        if row["step"] in self.seen:
            return
        self.seen.add(row["step"])
        self.context.log_metrics({k: v for k, v in row.items() if k != "step"}, int(row["step"]))
        if self.total:
            loss, lr, speed = row["total"], row["lr"], row["images_per_s"]
            self.context.show_figures(f"loss {loss:.4g}, lr {lr:.2e}, {speed:.0f} images/s")
            self.context.report_progress(row["step"], self.total, "steps")


class Relay:
    """Actor between rank 0 and the driver: rows of the curves, and why training had to stop."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.total = 0
        self.fatal: str | None = None

    def start(self, total: int) -> None:
        """Training begins: how many steps it has."""
        self.total = total

    def push(self, row: dict[str, float]) -> None:
        """A row of the curves, from rank 0."""
        self.rows.append(row)

    def stop(self, why: str) -> None:
        """Training cannot go on, and must not be tried again."""
        self.fatal = why

    def stopped(self) -> bool:
        """Whether a rank has said so."""
        return self.fatal is not None

    def drain(self) -> tuple[list[dict[str, float]], int, str | None]:
        """The rows since the last call, the number of steps, and why training had to stop."""
        rows, self.rows = self.rows, []
        return rows, self.total, self.fatal


@contextmanager
def drained(relay: Any, rows: CurveLog) -> Iterator[list[str]]:
    """Empties the relay twice a second while the body runs; yields a list that holds the reason of a stop, if any."""
    import ray

    fatal: list[str] = []
    stop = threading.Event()

    def drain() -> None:
        new, rows.total, why = ray.get(relay.drain.remote())
        for row in new:
            rows.add(row)
        if why and not fatal:
            fatal.append(why)

    def poll() -> None:
        while not stop.wait(0.5):
            drain()

    thread = threading.Thread(target=poll, name="training-relay", daemon=True)
    thread.start()
    try:
        yield fatal
    finally:
        stop.set()
        thread.join()
        drain()
