"""How shards are cut and packed: every row once, enough slices for all workers, large tasks before small ones."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.map_images.slices import Slice, count_cuts, cut, pack, split

rows_of_shards = st.lists(st.integers(0, 3000), min_size=1, max_size=60)


@given(rows_of_shards, st.integers(1, 2000))
def test_output_shards_cover_every_row_once_and_are_small(rows: list[int], most: int) -> None:
    shards = split(rows, most)
    assert [row for one in shards for row in ((one.shard, at) for at in range(one.start, one.stop))] == [
        (shard, at) for shard, size in enumerate(rows) for at in range(size)
    ]
    assert max(one.stop - one.start for one in shards) <= most
    assert len(shards) == sum(-(-size // most) or 1 for size in rows), "no more shards than needed"
    assert split(rows, None) == tuple(Slice(shard, 0, size) for shard, size in enumerate(rows))


@given(rows_of_shards, st.integers(1, 40))
def test_slices_cover_every_row_once_and_in_order(rows: list[int], workers: int) -> None:
    shards = dict(enumerate(rows))
    cuts = count_cuts(rows, workers)
    slices = cut(shards, cuts)
    assert len(slices) == cuts * len(rows)
    for shard, count in shards.items():
        own = [one for one in slices if one.shard == shard]
        assert (own[0].start, own[-1].stop) == (0, count)
        assert all(one.stop == following.start for one, following in itertools.pairwise(own))
    assert max(one.stop - one.start for one in slices) <= 1024


@pytest.mark.parametrize(
    ("rows", "workers", "cuts"),
    [
        ([100] * 32, 2, 1),  # shards enough
        ([100], 2, 13),  # down to 8 images a slice
        ([1000], 2, 16),
        ([1000] * 10, 64, 52),
        ([5], 16, 1),
        ([5000] * 100, 2, 5),  # a slice has at most 1024 images
        ([0], 2, 1),
    ],
)
def test_shards_are_cut_where_workers_would_have_nothing_to_do(rows: list[int], workers: int, cuts: int) -> None:
    assert count_cuts(rows, workers) == cuts


@given(st.integers(0, 300), st.integers(1, 1500), st.integers(1, 40))
def test_tasks_hold_all_slices_in_order_and_shrink(count: int, images: int, workers: int) -> None:
    slices = [Slice(shard, 0, images) for shard in range(count)]
    tasks = list(pack(slices, workers))
    assert [one for task in tasks for one in task] == slices
    sizes = [len(task) for task in tasks]
    assert sizes == sorted(sizes, reverse=True)
    assert all(size * images <= 1024 for size in sizes if size > 1)
    if count >= workers:
        assert sizes[-workers:] == [1] * workers, "at the end there is something for every worker"
