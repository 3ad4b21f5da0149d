"""The watch over a cluster's head: what ends the process, and what does not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from pipeline.run import head_watch
from pipeline.run.head_watch import HeadWatch

Watch = Callable[[list[str]], list[str]]


class Ended(Exception):
    """In place of the end of the process."""


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """`watched(sessions)` lets a watch hear these sessions, one a question, and gives what it ended the process for."""

    def run(sessions: list[str]) -> list[str]:
        answers: Iterator[str] = iter(sessions)
        clock = iter(range(0, 10_000, 50))
        said: list[str] = []

        def end(why: str) -> None:
            said.append(why)
            raise Ended

        def answer(address: str) -> str:
            session = next(answers, None)
            if session is None:
                raise Ended
            return session

        monkeypatch.setattr(head_watch, "ASK_SECONDS", 0.0)
        monkeypatch.setattr(head_watch, "_session", answer)
        monkeypatch.setattr(head_watch, "_end", end)
        monkeypatch.setattr(head_watch.time, "monotonic", lambda: next(clock))
        with contextlib.suppress(Ended):
            HeadWatch("head:6379").run()
        return said

    return run


def test_another_session_ends_the_run(watched: Watch) -> None:
    [why] = watched(["one", "one", "two"])
    assert why == "the head of the Ray cluster at head:6379 was replaced by a new one, which knows no run"


def test_a_head_that_is_away_for_a_moment_does_not(watched: Watch) -> None:
    assert watched(["one", "", "", "one", "", "one"]) == []


def test_a_head_that_stays_away_does(watched: Watch) -> None:
    [why] = watched(["one", "", "", "", ""])
    assert why == "the head of the Ray cluster at head:6379 has been away for 120 s"


def test_a_ray_that_cannot_be_asked_is_left_alone(watched: Watch) -> None:
    assert watched(["", "two", "three"]) == []
