"""Cuts the shards of a stage into slices, and packs slices into the tasks that Ray Data hands out. Pure functions.

`split` says which shards the output has; everything else is about those: their number, and rows counted from their
first.

All shards are cut into the same number of slices, so that Ray Data can put a shard together by counting: with the
order kept, every `cuts` results are one shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

_SLICES = 8  # a worker at least, where there are fewer shards
_SMALLEST = 8  # images of a slice, where shards are cut to give every worker work
_LARGEST = 1024  # images of a slice or of a task: what a lost worker computes again stays small


@dataclass(frozen=True)
class Slice:
    """Rows [start, stop) of one shard."""

    shard: int
    start: int
    stop: int


def split(rows: Sequence[int], most: int | None) -> tuple[Slice, ...]:
    """The shards of the output, as rows of those of the images: each is one, or several of nearly the same size.

    Args:
        rows: images of every shard.
        most: images of an output shard at most; None: as many as the images' shard has.
    """
    pieces = [-(-size // most) or 1 if most else 1 for size in rows]
    return tuple(one for shard, size in enumerate(rows) for one in cut({shard: size}, pieces[shard]))


def count_cuts(rows: Sequence[int], workers: int, *, each: int = _SLICES) -> int:
    """Slices that each shard is cut into: 1 where there are enough shards for all workers.

    Args:
        rows: images of every shard that is to be computed.
        workers: that compute at the same time.
        each: slices a worker at least, where there are fewer shards.
    """
    largest = max(rows, default=0)
    wanted = min(-(-each * workers // max(len(rows), 1)), -(-largest // _SMALLEST))
    return max(wanted, -(-largest // _LARGEST), 1)


def cut(rows: Mapping[int, int], cuts: int) -> list[Slice]:
    """Exactly `cuts` slices of every shard, in order; those of a small shard may be empty.

    Args:
        rows: images of every shard, by its index.
        cuts: slices a shard.
    """
    return [Slice(shard, size * i // cuts, size * (i + 1) // cuts) for shard, size in rows.items() for i in range(cuts)]


def pack(slices: Sequence[Slice], workers: int) -> Iterator[Sequence[Slice]]:
    """The slices in tasks, large ones first: each takes its share of half of what is left.

    Ray Data looks for finished tasks every 0.1 s, so a worker is idle for 0.1 to 0.2 s between two tasks: few large
    tasks waste little of that, and small ones at the end let all workers finish together.
    """
    largest = max((one.stop - one.start for one in slices), default=0)
    most, at = max(_LARGEST // max(largest, 1), 1), 0
    while at < len(slices):
        size = max(min((len(slices) - at) // (2 * workers), most), 1)
        yield slices[at : at + size]
        at += size
