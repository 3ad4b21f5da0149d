"""Threads that an interrupt can end: Python hands signals to the main thread only."""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import threading
import time
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")

_LEFT: list[threading.Thread] = []  # that could not be ended


class StageThread(threading.Thread):
    """Runs a stage beside others, with the context variables of its maker."""

    def __init__(self, name: str, body: Callable[[], None]) -> None:
        super().__init__(name=f"stage {name}", daemon=True)  # a process that ends does not wait for it
        self._body, self._context = body, contextvars.copy_context()

    def run(self) -> None:
        """The body, which keeps its errors itself."""
        with contextlib.suppress(KeyboardInterrupt):  # one that arrives when all is done
            self._context.run(self._body)

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt in it, as Ctrl-C does in the main thread, as soon as it runs Python code."""
        if self.ident is not None and self.is_alive():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident), ctypes.py_object(KeyboardInterrupt))


def end(threads: Iterable[StageThread], seconds: float) -> list[StageThread]:
    """Interrupt threads and wait for them. A second interrupt of this process ends the wait.

    Returns:
        Those that still run after `seconds`: they wait inside a library and may never look up.
    """
    running = [thread for thread in threads if thread.is_alive()]
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        for thread in running:
            thread.interrupt()
        deadline = time.monotonic() + seconds
        for thread in running:
            thread.join(max(0.0, deadline - time.monotonic()))
    left = [thread for thread in running if thread.is_alive()]
    _LEFT.extend(left)
    return left


def any_left() -> bool:
    """Whether a thread of an interrupted run still works: then Python and Ray cannot be shut down in an orderly way."""
    return any(thread.is_alive() for thread in _LEFT)


class _Call(threading.Thread, Generic[T]):
    def __init__(self, call: Callable[[], T]) -> None:
        super().__init__(name="call", daemon=True)
        self._call, self._context = call, contextvars.copy_context()
        self.result: list[T] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result.append(self._context.run(self._call))
        except BaseException as error:
            self.error = error


def interruptible(call: Callable[[], T]) -> T:
    """Call something that waits inside a library, as `ray.get` does, such that an interrupt ends the wait.

    The call goes on in a thread of its own, and its end is not waited for when the caller is interrupted.
    """
    thread = _Call(call)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if thread.error is not None:
        raise thread.error
    return thread.result[0]
