"""Two statistics of soft assignments, which methods with prototypes report as curves: they show a collapse early.

Shape legend: N samples, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def entropy(probabilities_NK: Tensor) -> Tensor:
    """Mean entropy of the rows, in nats: 0 if every assignment is to one prototype, log K if to all alike."""
    return -torch.special.xlogy(probabilities_NK, probabilities_NK).sum(dim=-1).mean()


def usage(probabilities_NK: Tensor) -> Tensor:
    """The share of prototypes in use: exp(entropy of the mean row) / K.

    1 if all prototypes are used equally, 1 / K if one takes everything.
    """
    mean_K = probabilities_NK.flatten(0, -2).mean(dim=0)
    return (-torch.special.xlogy(mean_K, mean_K).sum()).exp() / mean_K.numel()
