"""Sinkhorn-Knopp: from scores of samples against prototypes to balanced soft assignments.

Source: docs/methods.md#sinkhorn-knopp.

Shape legend: N samples of this rank, K prototypes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]  # a tensor of this rank -> its sum or maximum over all ranks


def _alone(value: Tensor) -> Tensor:
    return value


@torch.no_grad()
def sinkhorn(
    scores_NK: Tensor,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    all_reduce: Reduce | None = None,
    all_reduce_max: Reduce | None = None,
) -> Tensor:
    """Soft assignments of which every prototype gets about the same share. No gradient.

    Each iteration normalises the prototypes first and the samples last. SwAV, Leopart, ViCE and DINOv2 (where the
    teacher's temperature is epsilon) do the same. To balance over a queue too, append the scores of its rows and drop
    these rows from the result.

    Args:
        scores_NK: any real scores; N may be 0 on some ranks.
        epsilon: divides the scores; smaller makes the assignments harder.
        iterations: of the two normalisations.
        all_reduce: sums a tensor over ranks; None if this process holds all samples.
        all_reduce_max: maximum of a tensor over ranks; needed whenever `all_reduce` is.

    Returns:
        (N, K); each row sums to 1, each column to about (samples of all ranks) / K.

    Example:
        >>> sinkhorn(torch.eye(2)).round(decimals=3)
        tensor([[1., 0.],
                [0., 1.]])
    """
    reduce_sum, reduce_max = all_reduce or _alone, all_reduce_max or _alone
    samples, prototypes = scores_NK.shape
    logits_NK = scores_NK.to(torch.promote_types(scores_NK.dtype, torch.float32)) / epsilon
    # Subtracting the maximum of all ranks keeps exp from overflowing; it cancels in the first normalisation.
    lowest = logits_NK.new_full((1,), torch.finfo(logits_NK.dtype).min)
    top = reduce_max(torch.cat([logits_NK.amax().reshape(1), lowest]).amax() if samples else lowest[0])
    q_NK = (logits_NK - top).exp_()
    count = reduce_sum(logits_NK.new_tensor(float(samples)))
    # The paper first divides by the total. This cancels in the first normalisation, so it is left out.
    for _ in range(iterations):
        q_NK /= reduce_sum(q_NK.sum(dim=0)) * prototypes
        q_NK /= q_NK.sum(dim=1, keepdim=True) * count
    return q_NK * count
