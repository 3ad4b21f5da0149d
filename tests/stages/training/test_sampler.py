"""Batches hold the sources in exact proportion, every epoch sees every image, and nothing hangs on the rank."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.training.sampler import Sampler


def test_an_epoch_is_a_permutation() -> None:
    sampler = Sampler([20], [1.0], 6, seed=0)
    assert sampler.steps_per_epoch == 3
    epochs = [[slot.index for step in range(3 * e, 3 * e + 3) for slot in sampler.slots(step)] for e in range(4)]
    for epoch in epochs:
        assert len(set(epoch)) == 18  # two are left out ...
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert set().union(*epochs) == set(range(20))  # ... and come another time
    again = Sampler([20], [1.0], 6, seed=0).slots(7)
    assert again == sampler.slots(7)
    assert Sampler([20], [1.0], 6, seed=1).slots(7) != again


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=3),
    st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=3, max_size=3),
    st.integers(16, 64),
    st.integers(0, 200),
)
def test_every_batch_has_the_proportion(sizes: list[int], weights: list[float], batch: int, step: int) -> None:
    weights = weights[: len(sizes)]
    sampler = Sampler(sizes, weights, batch, seed=3)
    slots = sampler.slots(step)
    got = Counter(slot.source for slot in slots)
    for s, weight in enumerate(weights):
        assert abs(got[s] - weight / sum(weights) * batch) < 1
    assert len(slots) == batch
    assert all(0 <= slot.index < sizes[slot.source] for slot in slots)
    for s, size in enumerate(sizes):  # no image a second time before the others had their turn
        uses = Counter(slot.index for slot in slots if slot.source == s)
        assert max(uses.values()) - (min(uses.values()) if len(uses) == size else 0) <= 2


def test_every_rank_gets_the_mixture() -> None:
    slots = Sampler([100, 100], [1.0, 1.0], 32, seed=0).slots(0)
    for rank in range(4):
        assert Counter(s.source for s in slots[rank * 8 : rank * 8 + 8]) == {0: 4, 1: 4}


def test_a_batch_bigger_than_the_set_wraps_into_further_permutations() -> None:
    sampler = Sampler([5], [1.0], 12, seed=0)
    assert sampler.steps_per_epoch == 1
    slots = sampler.slots(4)
    assert [slot.repeat for slot in slots] == [0] * 5 + [1] * 5 + [2] * 2
    assert {slot.index for slot in slots[:5]} == {slot.index for slot in slots[5:10]} == set(range(5))
    assert len({(slot.index, slot.repeat) for slot in slots}) == 12


def test_slices_are_the_batch() -> None:
    sampler = Sampler([30, 40], [2.0, 1.0], 12, seed=0)
    whole = sampler.slots(9)
    assert sampler.slots(9, 0, 5) + sampler.slots(9, 5, 12) == whole


def test_impossible_mixtures_are_refused() -> None:
    with pytest.raises(ValueError, match="no image"):
        Sampler([10, 0], [1.0, 1.0], 4, seed=0)
    with pytest.raises(ValueError, match="leave a source without an image"):
        Sampler([10, 10], [1.0, 0.01], 4, seed=0)
