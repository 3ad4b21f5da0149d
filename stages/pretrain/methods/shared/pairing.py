"""Which other image of the global batch goes with each image: drawn at random, or the next one.

Both are the same whatever the number of ranks: a partner may be an image of another rank, so its values are gathered.

Shape legend: B images of this rank, N of all ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.pretrain.data.batch import Batch
from stages.training.collectives import gather, rank, world_size


def random_partners(batch: Batch) -> Tensor:
    """The partner of each image in a random derangement of the global batch, drawn from the step's seed.

    Every permutation of the N images that leaves none in its place is equally likely, so that a pair is as likely to
    be of two sources as their shares of the batch say.

    Returns:
        (B,) int64, rows of the global batch: what `gather` returns holds the partner's values there.

    Raises:
        ValueError: if the global batch has one image.
    """
    count, generator = len(batch) * world_size(), batch.generator()
    if count < 2:
        raise ValueError("a batch of one image has no pair of images")
    in_place = torch.arange(count)
    drawn = torch.randperm(count, generator=generator)
    while (drawn == in_place).any():  # of all permutations, about one in e is a derangement
        drawn = torch.randperm(count, generator=generator)
    return drawn[batch.offset : batch.offset + len(batch)].to(batch.image_ids.device)


def next_in_batch(value_B: Tensor) -> Tensor:
    """For each image the value of the next one in the global batch, for the last one that of the first.

    Args:
        value_B: (B, ...), one value an image. Without gradient for the row that comes from the next rank.
    """
    first_of_ranks = gather(value_B[:1])
    following = first_of_ranks[(rank() + 1) % world_size()]
    return torch.cat([value_B[1:], following[None]])
