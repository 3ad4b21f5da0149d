"""MoCo v3's loss: queries against the keys of all images of the batch.

Source: docs/methods.md#moco (MoCo v3, Algorithm 1).

MoCo v2, whose negatives come from a queue, uses lightly's NT-Xent (hosts/moco.py).

Shape legend: B images of this rank, A images of all ranks, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor


def in_batch_contrast(query_BD: Tensor, keys_AD: Tensor, *, first: int = 0, temperature: float = 0.2) -> Tensor:
    """2 T times the mean cross-entropy of each query's own key among all keys, with cosines / T as scores: a scalar.

    Args:
        query_BD: the queries; normalised here.
        keys_AD: the keys of all ranks; normalised here, used without gradient.
        first: index of the key that belongs to the first query. Ranks hold consecutive images.
        temperature: T.
    """
    logits_BA = functional.normalize(query_BD, dim=1) @ functional.normalize(keys_AD.detach(), dim=1).T / temperature
    labels_B = torch.arange(first, first + len(query_BD), device=query_BD.device)
    return 2 * temperature * functional.cross_entropy(logits_BA, labels_B)
