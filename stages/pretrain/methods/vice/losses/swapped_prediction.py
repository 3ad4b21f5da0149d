"""ViCE's swapped prediction: every other view of a region predicts what the first view was assigned to (Eq. 3).

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
        scores_VRK: cosines of regions and prototypes in all views but the first, regions in the same order.
        targets_RK: the first view's soft assignments (Sinkhorn); used without gradient.
        weight_R: default 1 / R, the official mean over all regions; 1 / (N I_n) for a region of an image that has I_n,
            of N images, is Eq. 3.
    """
    losses_R = soft_cross_entropy(scores_VRK, targets_RK, temperature=temperature).mean(dim=0)
    return losses_R.mean() if weight_R is None else (losses_R * weight_R).sum()


def pushed(queue_QD: Tensor, newest_ND: Tensor) -> Tensor:
    """The queue after a batch: newest first, the oldest fall out; of more rows than it holds, the first ones stay."""
    return torch.cat([newest_ND, queue_QD])[: len(queue_QD)]
