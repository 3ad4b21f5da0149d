"""Two numbers about soft assignments that every method shows as curves: a collapse is seen in them first.

Shape legend: N samples, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def entropy(probabilities_NK: Tensor) -> Tensor:
    """Mean entropy of the rows, in nats."""
    return -torch.special.xlogy(probabilities_NK, probabilities_NK).sum(dim=-1).mean()


def usage(probabilities_NK: Tensor) -> Tensor:
    """exp(entropy of the mean row) / K: 1 when all prototypes are used alike, 1 / K when one takes all."""
    mean_K = probabilities_NK.flatten(0, -2).mean(dim=0)
    return (-torch.special.xlogy(mean_K, mean_K).sum()).exp() / mean_K.numel()
