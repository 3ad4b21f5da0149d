"""Pairs every image of a batch with another one, in the same way whatever the number of ranks.

The global batch is cut into groups of consecutive images. Inside a group the images are shifted cyclically. A group
lies inside one rank's rows, so the pairs are those that a single process would make.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.pretrain.data.batch import Batch


def partners(batch: Batch, group: int, *, setting: str, shift: int | None = None) -> Tensor:
    """The partner of each image: another image of its group, never itself.

    Args:
        batch: one rank's rows of the global batch.
        group: images in a group, at least 2.
        setting: dotted path of the config's `group`, for the error message.
        shift: by how many images a group is shifted, from 1 to group - 1; None: drawn from the step's seed.

    Returns:
        (B,) int64, rows of this rank.

    Raises:
        ValueError: if this rank's rows cannot be cut into whole groups.
    """
    count = len(batch)
    if count % group or batch.offset % group:
        raise ValueError(
            f"{setting} is {group}, which does not divide the {count} images that a rank has at once: "
            "choose a divisor of batch_size / (resources.workers * accumulate), at least 2"
        )
    if shift is None:
        shift = int(torch.randint(1, group, (), generator=batch.generator()))
    position = torch.arange(count, device=batch.image_ids.device)
    first = position - position % group
    return first + (position % group + shift) % group
