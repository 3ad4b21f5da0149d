"""FLSL's three terms.

Source: docs/methods.md#flsl-terms (Eq. 8, 11 and 13).

Shape legend: R queries of all crops and images, D width, K centroids.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as functional
from torch import Tensor


def intra_view(query_RD: Tensor, mode_RD: Tensor) -> Tensor:
    """Level 1: squared distance of a query and its mode after normalisation, 2 - 2 cos: (R,) in [0, 4].

    Both get a gradient. This is what the released code computes. The paper's pseudo-code differs: it multiplies two
    differences, and one of them uses a variable that was overwritten before.
    """
    return 2 - 2 * functional.cosine_similarity(query_RD, mode_RD, dim=-1, eps=1e-12)


def inter_view(log_p_RK: Tensor, targets_RK: Tensor) -> Tensor:
    """Level 2: cross-entropy of the student's log-probabilities against the teacher's assignments: (R,).

    `targets_RK` are used without gradient.
    """
    return -(targets_RK.detach() * log_p_RK).sum(dim=-1)


def volume(mean_K: Tensor, log_prior_K: Tensor | None = None) -> Tensor:
    """KL(mean assignment || prior), which keeps all clusters in use.

    Args:
        mean_K: (..., K), the mean of the student's assignments over all queries of all crops, images and ranks.
        log_prior_K: logarithm of the wanted share of each centroid; None: all the same.

    Returns:
        (...), each >= 0.
    """
    log_mean_K = mean_K.clamp(min=torch.finfo(mean_K.dtype).tiny).log()
    negative_entropy = (mean_K * log_mean_K).sum(dim=-1)
    if log_prior_K is None:
        return negative_entropy + math.log(mean_K.shape[-1])
    return negative_entropy - (mean_K * log_prior_K).sum(dim=-1)
