"""Sinkhorn-Knopp: scores of samples against prototypes -> balanced soft assignments (docs/methods.md#sinkhorn-knopp).

Shape legend: N samples of this rank, K prototypes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]


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
    """Soft assignments (N, K): rows sum to 1, columns to about (samples of all ranks) / K. No gradient.

    SwAV, DINOv2 (whose teacher temperature is our epsilon), Leopart and ViCE use this same map: prototypes are
    normalised first, samples last. To balance over a queue too, append its scores and drop its rows afterwards.

    Args:
        scores_NK: any real scores; N may be 0 on some ranks.
        epsilon: sharpness; smaller is harder.
        all_reduce: sums a tensor over ranks; None when this process holds all samples.
        all_reduce_max: the maximum likewise, needed whenever `all_reduce` is.

    Example:
        >>> sinkhorn(torch.eye(2)).round(decimals=3)
        tensor([[1., 0.],
                [0., 1.]])
    """
    reduce_sum, reduce_max = all_reduce or _alone, all_reduce_max or _alone
    samples, prototypes = scores_NK.shape
    logits_NK = scores_NK.to(torch.promote_types(scores_NK.dtype, torch.float32)) / epsilon
    # A common shift cancels in the first normalisation and keeps exp from overflowing; it must be common to all ranks.
    lowest = logits_NK.new_full((1,), torch.finfo(logits_NK.dtype).min)
    top = reduce_max(torch.cat([logits_NK.amax().reshape(1), lowest]).amax() if samples else lowest[0])
    q_NK = (logits_NK - top).exp_()
    count = reduce_sum(logits_NK.new_tensor(float(samples)))
    # The initial division by the total cancels in the first row normalisation and is left out.
    for _ in range(iterations):
        q_NK /= reduce_sum(q_NK.sum(dim=0)) * prototypes
        q_NK /= q_NK.sum(dim=1, keepdim=True) * count
    return q_NK * count
