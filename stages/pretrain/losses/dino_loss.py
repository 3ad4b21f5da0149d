"""DINO's loss: student crops predict the teacher's distribution for the other global crops.

Source: docs/methods.md#dino.

Shape legend: V student crops, G teacher (global) crops, the first G of the student's V; B images, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dino_loss(student_VBK: Tensor, targets_GBK: Tensor, *, temperature: float = 0.1) -> Tensor:
    """Cross-entropy of every (teacher crop, student crop) pair with different index, averaged over the pairs.

    CoTAP's image-level alignment is the same cross-entropy.

    Source: docs/methods.md#dino (Eq. 3).

    Args:
        student_VBK: scores of all crops, the G global ones first.
        targets_GBK: teacher distributions over K (`centred_softmax` or Sinkhorn assignments); used without gradient.
        temperature: of the student's softmax.

    Returns:
        (B,), one loss for each image.

    Raises:
        ValueError: if there is only one crop, so that no pair exists.
    """
    crops, globals_ = len(student_VBK), len(targets_GBK)
    pairs = globals_ * crops - globals_
    if pairs < 1:
        raise ValueError("one crop has no other crop to predict: ask for at least two views")
    targets_GBK = targets_GBK.detach()
    log_p_VBK = torch.log_softmax(student_VBK / temperature, dim=-1)
    # Sum over pairs: each crop against the sum of all targets minus its own. This reads V*B*K values once, not G times.
    total_BK = targets_GBK.sum(dim=0)
    others_GBK = total_BK - targets_GBK
    loss_B = -(others_GBK * log_p_VBK[:globals_]).sum(dim=(0, 2))
    if crops > globals_:
        loss_B = loss_B - (total_BK * log_p_VBK[globals_:].sum(dim=0)).sum(dim=-1)
    return loss_B / pairs


def centred_softmax(teacher_GBK: Tensor, center_K: Tensor, temperature: float) -> Tensor:
    """The teacher's distribution softmax((t - c) / T) of scores t with the centre c, without gradient."""
    return torch.softmax((teacher_GBK.detach() - center_K) / temperature, dim=-1)


def moved_center(center_K: Tensor, teacher_mean_K: Tensor, momentum: float = 0.9) -> Tensor:
    """The centre after a step, m c + (1 - m) mean.

    Args:
        center_K: the centre c before the step.
        teacher_mean_K: mean of the teacher's scores over the crops and images of all ranks.
        momentum: m.
    """
    return center_K * momentum + teacher_mean_K * (1 - momentum)
