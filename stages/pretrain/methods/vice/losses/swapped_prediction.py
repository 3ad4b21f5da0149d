"""ViCE's swapped prediction: every other view of a region predicts what the region is assigned to in the first view.

Source: docs/methods.md#vice-terms (Eq. 3).

Shape legend: V views that predict, R regions of a batch, K prototypes, D width, Q rows of the queue.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.pretrain.losses.soft_cross_entropy import soft_cross_entropy


def swapped_prediction(
    scores_VRK: Tensor, targets_RK: Tensor, *, temperature: float = 0.1, weight_R: Tensor | None = None
) -> Tensor:
    """Mean over views of the weighted sum over regions of -sum_k q_k log softmax(s / T)_k, a scalar.

    Args:
        scores_VRK: s, cosines of regions and prototypes in all views but the first; regions in the same order.
        targets_RK: q, the first view's soft assignments from Sinkhorn; used without gradient.
        temperature: T.
        weight_R: weight of each region. None: 1 / R, the mean over all regions (the official code). Eq. 3 is
            1 / (N I_n) for the regions of an image with I_n regions, one of N images.
    """
    losses_R = soft_cross_entropy(scores_VRK, targets_RK, temperature=temperature).mean(dim=0)
    return losses_R.mean() if weight_R is None else (losses_R * weight_R).sum()


def pushed(queue_QD: Tensor, newest_ND: Tensor) -> Tensor:
    """The queue after a batch: the newest rows first, cut to the queue's length."""
    return torch.cat([newest_ND, queue_QD])[: len(queue_QD)]
