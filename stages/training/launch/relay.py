"""Between the ranks, Ray Train's controller and the driver: rows, lines for the user, wishes, and why training stopped.

Imports neither torch nor Ray: the relay runs in a process of its own, which should start fast.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
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
    """Actor between the training and the driver.

    From rank 0: rows of the curves. From any rank: why training had to stop. From Ray Train's controller: lines for
    the user. To rank 0: the driver's and the controller's wish for a checkpoint.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.lines: list[str] = []
        self.total = 0
        self.starts = 0
        self.fatal: str | None = None
        self.wishes = self.granted = 0

    def start(self, total: int, step: int, ranks: int) -> None:
        """Training begins, or begins again: how many steps it has in all, how many are done, who trains."""
        self.total, self.starts = total, self.starts + 1
        if self.starts > 1:
            self.lines.append(f"training goes on from step {step} of {total} on {ranks} rank{'s' if ranks > 1 else ''}")

    def push(self, row: dict[str, float]) -> None:
        """A row of the curves, from rank 0."""
        self.rows.append(row)

    def say(self, line: str) -> None:
        """Something that the user should know."""
        self.lines.append(line)

    def stop(self, why: str) -> None:
        """Training cannot go on, and must not be tried again."""
        self.fatal = why

    def stopped(self) -> bool:
        """Whether a rank has said so."""
        return self.fatal is not None

    def is_training(self) -> bool:
        """Whether rank 0 has begun."""
        return self.starts > 0

    def wish(self) -> None:
        """Ask rank 0 for a checkpoint as soon as possible."""
        self.wishes += 1

    def wished(self) -> int:
        """How often a checkpoint was asked for."""
        return self.wishes

    def saved(self) -> None:
        """A checkpoint is in the store."""
        self.granted = self.wishes

    def is_granted(self) -> bool:
        """Whether a checkpoint was made since the last wish."""
        return self.granted == self.wishes

    def drain(self) -> tuple[list[dict[str, float]], list[str], int, str | None]:
        """The rows and the lines since the last call, the number of steps, and why training had to stop."""
        rows, self.rows = self.rows, []
        lines, self.lines = self.lines, []
        return rows, lines, self.total, self.fatal


def start_relay() -> Any:
    """The actor, on the driver's own node: a lost worker node must not take it away. Costs no CPU."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Relay).remote()


@contextmanager
def drained(relay: Any, rows: CurveLog, say: Callable[[str], None]) -> Iterator[list[str]]:
    """Empties the relay twice a second while the body runs; yields a list that holds the reason of a stop, if any."""
    import ray

    fatal: list[str] = []
    stop = threading.Event()

    def drain() -> None:
        new, lines, rows.total, why = ray.get(relay.drain.remote())
        for line in lines:
            say(line)
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
