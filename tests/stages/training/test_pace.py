"""When a checkpoint is due: by a clock of the test's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stages.training.pace import GUESSED_RATE, SHARE, Pace, guess_seconds
from stages.training.settings import LoopSettings


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def saved_at(cost: float, until: float, *, first_guess: float = 0.0, **settings: object) -> list[float]:
    """Times at which a training with steps of a tenth of a second begins to save, when saving takes `cost` seconds."""
    clock, times = Clock(), []
    pace = Pace(LoopSettings.model_validate({"steps": 9, **settings}), first_guess, clock)
    done = 0
    while clock.now < until:
        clock.now, done = clock.now + 0.1, done + 1
        if pace.due(done):
            times.append(clock.now)
            clock.now += cost
            pace.saved(cost)
    return times


def test_a_cheap_checkpoint_is_made_every_two_seconds() -> None:
    assert saved_at(0.01, 10) == pytest.approx([2.0, 4.0, 6.1, 8.1], abs=0.15)


@pytest.mark.parametrize("cost", [0.2, 1.0, 10.0])
def test_checkpoints_take_less_than_three_hundredths_of_the_time(cost: float) -> None:
    times = saved_at(cost, 5000, first_guess=cost)
    assert cost * len(times) < 0.03 * 5000
    assert cost * len(times) > 0.9 * SHARE * 5000 - cost  # and no rarer than that asks for


def test_an_expensive_checkpoint_waits_for_the_longest_interval_and_no_longer() -> None:
    assert saved_at(60, 2000) == pytest.approx([2, 662, 1322, 1982], abs=1)
    assert saved_at(60, 300, checkpoint_minutes=1) == pytest.approx([2, 122, 242], abs=1)


def test_steps_override_the_clock() -> None:
    assert saved_at(0.0, 1.0, checkpoint_every=4) == pytest.approx([0.4, 0.8])


def test_the_first_checkpoint_waits_for_as_long_as_its_bytes_ask() -> None:
    module = nn.Linear(1000, 999)  # 1,000,000 minus 1 parameters of 4 bytes
    frozen = nn.Linear(1000, 999).requires_grad_(False)
    both = nn.ModuleList([module, frozen])
    adam = torch.optim.AdamW(module.parameters())
    assert guess_seconds(both, adam) == pytest.approx((2 + 2) * 999_999 * 4 / GUESSED_RATE, rel=1e-2)
    sgd = torch.optim.SGD(module.parameters(), lr=1.0)
    assert guess_seconds(both, sgd) == pytest.approx((2 + 1) * 999_999 * 4 / GUESSED_RATE, rel=1e-2)
