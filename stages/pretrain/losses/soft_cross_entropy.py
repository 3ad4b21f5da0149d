"""Cross-entropy of scores against soft targets: CE(a, b) = -sum_k b_k log a_k with a = softmax(scores / T).

Source: docs/methods.md#notation.

Shape legend: B rows (images or cells), K classes or prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def soft_cross_entropy(logits_BK: Tensor, targets_BK: Tensor, *, temperature: float = 0.1) -> Tensor:
    """One cross-entropy for each row.

    Args:
        logits_BK: scores, of which a is the softmax; more leading axes are allowed.
        targets_BK: b, rows that sum to 1; used without gradient.
        temperature: T.

    Returns:
        (B,), or the leading axes of the input.
    """
    return -(targets_BK.detach() * torch.log_softmax(logits_BK / temperature, dim=-1)).sum(dim=-1)
