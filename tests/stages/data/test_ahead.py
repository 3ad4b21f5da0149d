"""Rows come prepared, in order, a bounded number of them ahead; a failure is the value of its row."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.data.ahead import in_batches, prepare_ahead


def test_order_is_kept_and_failures_are_values() -> None:
    def invert(number: int) -> float:
        time.sleep(0.002 * (number % 5))  # later ones are ready first
        return 1 / (number % 7)

    results = list(prepare_ahead(range(40), invert, threads=4, ahead=8))
    assert [number for number, _ in results] == list(range(40))
    for number, result in results:
        if number % 7:
            assert result == 1 / (number % 7)
        else:
            assert isinstance(result, ZeroDivisionError)


@pytest.mark.parametrize("ahead", [0, 3, 10])
def test_no_more_rows_are_read_than_asked_for(ahead: int) -> None:
    read: list[int] = []

    def rows() -> object:
        for number in range(50):
            read.append(number)
            yield number

    results = prepare_ahead(rows(), str, threads=2, ahead=ahead)
    for number in range(20):
        assert next(results) == (number, str(number))
        assert len(read) == number + 1 + ahead


def test_rows_are_prepared_while_the_caller_works() -> None:
    third = threading.Event()
    results = prepare_ahead(range(3), lambda number: third.set() if number == 2 else None, threads=1, ahead=2)
    next(results)
    assert third.wait(10), "row 2 is prepared although nobody has asked for it"


def test_what_the_reader_raises_reaches_the_caller() -> None:
    def rows() -> object:
        yield 1
        raise OSError("disk")

    results = prepare_ahead(rows(), str, threads=1, ahead=0)
    assert next(results) == (1, "1")
    with pytest.raises(OSError, match="disk"):
        next(results)


@given(st.lists(st.integers(), max_size=30), st.integers(1, 9))
def test_batches(items: list[int], size: int) -> None:
    batches = list(in_batches(items, size))
    assert [item for batch in batches for item in batch] == items
    assert all(len(batch) == size for batch in batches[:-1])
    assert all(0 < len(batch) <= size for batch in batches)
