"""Which images make up which batch: a pure function of the seed and the step number.

A source gives the same number of images to every global batch, spread evenly over its rows, so that all ranks' shares
hold the same mixture. The order of a source is a new permutation every epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Slot:
    """One row of a global batch."""

    source: int
    index: int  # of the image within its source
    epoch: int
    repeat: int  # how many times this epoch has gone through the whole source before


class Sampler:
    """Fills global batches from one or several sources.

    An epoch is as many whole batches as the images of all sources fill (the images left over are dropped; another
    epoch's permutation drops others), and at least one. A source that is used up before the epoch ends, because its
    weight is large or because the batch is bigger than the set, goes on with further permutations of itself.

    Args:
        sizes: images of each source.
        weights: share of each source in a batch, relative to the others. Where a share is no whole number of images,
            it is rounded down, and the images still missing go to the sources with the largest remainders.
        global_batch: images of a batch over all ranks.
        seed: of the permutations.

    Raises:
        ValueError: for a source without images, or one whose share of the batch is less than an image.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], global_batch: int, seed: int) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"a source has no image: {list(sizes)}")
        self.sizes, self.seed, self.global_batch = tuple(sizes), seed, global_batch
        self.counts = apportion(weights, global_batch)
        if min(self.counts) < 1:
            raise ValueError(f"weights {list(weights)} leave a source without an image in a batch of {global_batch}")
        self.steps_per_epoch = max(1, sum(sizes) // global_batch)
        self._pattern = _interleave(self.counts)

    def slots(self, step: int, start: int = 0, stop: int | None = None) -> list[Slot]:
        """Rows start..stop-1 (default: all) of global batch number `step`."""
        epoch, i = divmod(step, self.steps_per_epoch)
        slots = []
        for source, nth in self._pattern[start:stop]:
            repeat, at = divmod(i * self.counts[source] + nth, self.sizes[source])
            order = _permutation(self.seed, epoch, source, repeat, self.sizes[source])
            slots.append(Slot(source, int(order[at]), epoch, repeat))
        return slots


def generator(seed: int, epoch: int, source: int, image_id: int, stream: int = 0) -> np.random.Generator:
    """The random generator of one image in one epoch.

    Args:
        seed: of the training.
        epoch: 0-based.
        source: number of the image's source.
        image_id: within that source.
        stream: tells apart what is drawn for the same image in the same epoch more than once, or for another purpose.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, source, image_id, stream])))


def apportion(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """Images of each source in a batch of `total`."""
    shares = [weight / sum(weights) * total for weight in weights]
    counts = [int(share + 1e-9) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda s: (counts[s] - shares[s], s))
    for s in by_remainder[: total - sum(counts)]:
        counts[s] += 1
    return tuple(counts)


def _interleave(counts: Sequence[int]) -> list[tuple[int, int]]:
    """For each row of a batch its source, and how many of the batch's rows that source has had before it.

    A row goes to the source that is furthest behind its share of the rows so far.
    """
    total, given = sum(counts), [0] * len(counts)
    rows = []
    for row in range(total):
        source = max(range(len(counts)), key=lambda s: (counts[s] * (row + 1) - given[s] * total, -s))
        rows.append((source, given[source]))
        given[source] += 1
    return rows


@lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, source: int, repeat: int, size: int) -> NDArray[np.int64]:
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch, source, repeat, 0x0E70C4]))
    return np.random.Generator(bits).permutation(size)
