"""What a rank is told about its end, and a training that is interrupted: it saves at once and goes on from there."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from stages.training.launch import notices
from stages.training.launch.notices import RankNotices, noticing_signals
from stages.training.notice import Notice
from tests.stages.pretrain.conftest import RunStage


@pytest.fixture
def warning(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Ray's warning, the last in the list."""
    warnings: list[Any] = [None]
    monkeypatch.setattr(notices, "preemption", lambda: warnings[-1])
    monkeypatch.setattr(RankNotices, "_ask", lambda self, relay: None)
    yield warnings
    notices._terminated.clear()


def drained(seconds: float | None, *nodes: str) -> Any:
    return SimpleNamespace(deadline_ms=seconds and (time.time() + seconds) * 1000, nodes=nodes)


def test_a_warning_saves_once_and_again_before_the_node_goes(warning: list[Any]) -> None:
    told = RankNotices(0, None)
    assert told() == Notice.NONE
    warning.append(drained(60, "a"))
    assert [told(), told()] == [Notice.SAVE, Notice.NONE]
    warning[-1].deadline_ms -= 50_000
    assert [told(), told()] == [Notice.SAVE, Notice.NONE]
    warning.append(drained(None, "a", "b"))
    assert [told(), told()] == [Notice.SAVE, Notice.NONE]


def test_only_rank_0_speaks_for_all_but_each_for_itself(warning: list[Any]) -> None:
    told = RankNotices(1, None)
    warning.append(drained(60, "a"))
    assert told() == Notice.NONE
    notices._terminated.set()
    assert told() == Notice.LEAVE


def test_a_wish_saves_once(warning: list[Any]) -> None:
    told = RankNotices(0, None)
    told.wishes = 1
    assert [told(), told()] == [Notice.SAVE, Notice.NONE]


def test_the_first_signal_is_a_notice_and_acts_when_the_training_has_saved() -> None:
    def end(number: int, frame: object) -> NoReturn:
        raise SystemExit(143)

    def train() -> None:
        with noticing_signals() as told:
            assert told() == Notice.NONE
            signal.raise_signal(signal.SIGTERM)
            assert told() == Notice.LEAVE
            assert signal.getsignal(signal.SIGTERM) is end  # a second one ends it at once

    before = signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(SystemExit, match="143"):
            train()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_interrupted_training_has_saved_the_step_it_was_at(run_stage: RunStage) -> None:
    settings = {"steps": 6, "checkpoint_every": 100, "resources": {"workers": 0}}

    def interrupt(metrics: Mapping[str, float], step: int) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_stage("a" * 24, settings, interrupt)
    rows: list[int] = []
    _, cut = run_stage("a" * 24, settings, lambda metrics, step: rows.append(step))
    assert rows == [5, 6, 1, 2, 3, 4]  # those before the interrupt come from the checkpoint
    assert cut.manifest.notes["ranks"] == {"0": 1}
