"""MoCo v3: queries against the keys of all images of the batch
(docs/methods.md#moco). v1 and v2, whose negatives come from
a queue, use lightly's NT-Xent.

Shape legend: B images of this rank, A images of all ranks, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor


def in_batch_contrast(query_BD: Tensor, keys_AD: Tensor, *, first: int = 0, temperature: float = 0.2) -> Tensor:
    """2 T times the cross-entropy of each query's own key among all keys, cosines / T as logits: a scalar mean.

    Args:
        query_BD, keys_AD: normalised here; keys without gradient.
        first: which of the keys belongs to the first query (ranks hold consecutive images).

    Source: MoCo v3, Algorithm 1.
    """
    logits_BA = functional.normalize(query_BD, dim=1) @ functional.normalize(keys_AD.detach(), dim=1).T / temperature
    labels_B = torch.arange(first, first + len(query_BD), device=query_BD.device)
    return 2 * temperature * functional.cross_entropy(logits_BA, labels_B)
