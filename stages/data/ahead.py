"""Prepares rows in threads ahead of the code that consumes them: photographs are decoded while a model computes.

Threads, not processes: OpenCV and NumPy release the interpreter's lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

R = TypeVar("R")
T = TypeVar("T")


def prepare_ahead(
    rows: Iterable[R], prepare: Callable[[R], T], *, threads: int, ahead: int
) -> Iterator[tuple[R, T | Exception]]:
    """Every row with `prepare(row)`, in order; an exception of `prepare` is a value here, for the caller to judge.

    Args:
        rows: read in the caller's thread, a row at a time.
        prepare: runs in the threads; must not depend on the order of the calls.
        threads: that prepare at the same time.
        ahead: rows that are prepared beyond the one that was asked for; bounds the memory.
    """
    waiting: deque[tuple[R, Future[T | Exception]]] = deque()

    def attempt(row: R) -> T | Exception:
        try:
            return prepare(row)
        except Exception as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        for row in rows:
            waiting.append((row, pool.submit(attempt, row)))
            if len(waiting) > ahead:
                first, future = waiting.popleft()
                yield first, future.result()
        for row, future in waiting:
            yield row, future.result()


def in_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
