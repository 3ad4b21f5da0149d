"""Cross-entropy of logits against soft targets, one value a row: CE(a, b) = -sum_k b_k log a_k
(docs/methods.md#notation).

Shape legend: B rows (images or cells), K classes or prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def soft_cross_entropy(logits_BK: Tensor, targets_BK: Tensor, *, temperature: float = 0.1) -> Tensor:
    """(B,) cross-entropies; targets (rows summing to 1) are used without gradient."""
    return -(targets_BK.detach() * torch.log_softmax(logits_BK / temperature, dim=-1)).sum(dim=-1)
