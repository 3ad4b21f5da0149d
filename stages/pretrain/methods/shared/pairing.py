"""Which other image of the batch each image is compared with: a derangement that no rank boundary changes.

The global batch is cut into groups of consecutive images; inside each, images are shifted cyclically, by an
amount drawn from the step's seed where none is given. As long as groups do not straddle ranks, the pairs are those of
one process.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.pretrain.data.batch import Batch


def partners(batch: Batch, group: int, *, setting: str, shift: int | None = None) -> Tensor:
    """(B,) index, within this rank's rows, of each image's partner; never the image itself.

    Args:
        shift: by how much each group is shifted, below `group`; None: drawn.
        setting: where a config says `group`, for the message.

    Raises: ValueError if groups of that size do not fill this rank's rows.
    """
    count = len(batch)
    if count % group or batch.offset % group:
        raise ValueError(
            f"{setting} is {group}, which does not divide the {count} images that a worker has at once: "
            "choose a divisor of batch_size / (workers * accumulate), at least 2"
        )
    if shift is None:
        shift = int(torch.randint(1, group, (), generator=batch.generator()))
    position = torch.arange(count, device=batch.image_ids.device)
    first = position - position % group
    return first + (position % group + shift) % group
