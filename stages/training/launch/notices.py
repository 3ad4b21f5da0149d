"""What a rank is told about its end: by SIGTERM, by Ray when it drains a node, by the driver."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from stages.training.notice import Notice

BEFORE_DEADLINE_S = 15.0  # a drained node's training is saved once more so long before the node goes

_terminated = threading.Event()  # this process got SIGTERM


def listen() -> None:
    """Take SIGTERM as a notice instead of an end. To be called in a process's main thread."""
    _terminated.clear()
    signal.signal(signal.SIGTERM, lambda signum, frame: _terminated.set())


class RankNotices:
    """The notices of one rank under Ray Train; the loop asks in every step.

    Every rank answers for its own process. Rank 0 alone answers for what all would see: drained nodes and the driver's
    wish, which a thread asks the relay for.

    Args:
        rank: of this process.
        relay: actor handle (relay.py).
    """

    def __init__(self, rank: int, relay: Any) -> None:
        self.rank, self.acted_on = rank, 0
        self.wishes = 0
        self.drain: Any = None  # the newest warning, and whether the save before its deadline is still to come
        self.second_due = False
        if rank == 0:
            threading.Thread(target=self._ask, args=(relay,), name="training-notices", daemon=True).start()

    def __call__(self) -> Notice:
        """The most urgent notice."""
        if _terminated.is_set():
            return Notice.LEAVE
        if self.rank != 0:
            return Notice.NONE
        asked, self.acted_on = self.wishes > self.acted_on, self.wishes
        return Notice.SAVE if self._drained() or asked else Notice.NONE

    def _drained(self) -> bool:
        """Whether a warning is new, or the time of the last one is nearly over."""
        warning = preemption()
        if warning is None:
            return False
        left = warning.deadline_ms / 1000 - time.time() if warning.deadline_ms else 0.0
        if warning != self.drain:
            self.drain, self.second_due = warning, left > 2 * BEFORE_DEADLINE_S
            return True
        if self.second_due and left < BEFORE_DEADLINE_S:
            self.second_due = False
            return True
        return False

    def _ask(self, relay: Any) -> None:
        import ray

        try:
            self.acted_on = self.wishes = ray.get(relay.wished.remote())
            while True:
                time.sleep(0.5)
                self.wishes = ray.get(relay.wished.remote())
        except ray.exceptions.RayError:
            return  # the driver is gone, and this process will be soon


def preemption() -> Any:
    """Ray's warning that a node of this training will be taken away (`ray.train.PreemptionInfo`), or None.

    `ray.train.get_preemption_info` gives the same and waits for all ranks in each call: too dear for every step.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info


@contextmanager
def noticing_signals() -> Iterator[Callable[[], Notice]]:
    """Yields the notices of a training in this process: the first SIGINT or SIGTERM lets it save and stop.

    A second one acts as it did before, and so does the first once the body has ended. Signals reach the main thread
    only: a training in another one gets none, and is stopped without a last checkpoint.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: Notice.NONE
        return
    got: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def take(number: int, frame: FrameType | None) -> None:
        got.append(number)
        restore()

    for number in before:
        signal.signal(number, take)
    try:
        yield lambda: Notice.LEAVE if got else Notice.NONE
    finally:
        restore()
        if got:
            signal.raise_signal(got[0])
