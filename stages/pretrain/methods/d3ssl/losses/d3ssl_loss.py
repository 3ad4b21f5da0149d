"""D3SSL's contrast of regions against a memory bank.

Source: docs/methods.md#d3ssl-losses (Eq. 4, 5 and 9).

Shape legend: N regions, D width, M rows of the bank, P positives of each region. All vectors have length 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bank_nce(
    z_ND: Tensor, positives_PND: Tensor, bank_MD: Tensor, *, temperature: float = 0.2, filled: Tensor | None = None
) -> Tensor:
    """Eq. 5 for several positives of the same regions: -log exp(z z+ / T) / (exp(z z+ / T) + sum_neg exp(z z- / T)).

    Only the rows of the bank are negatives, not the other regions or the other positives.

    Args:
        z_ND: regions of the student, which get the gradient.
        positives_PND: regions of the teacher, without gradient.
        bank_MD: earlier regions of the teacher, without gradient.
        temperature: T.
        filled: 0-d integer, how many rows of the bank are in use; None: all. If it is 0, the loss is 0.

    Returns:
        (P, N), each >= 0.
    """
    negative_NM = z_ND @ bank_MD.detach().T / temperature
    if filled is not None:
        unused_M = torch.arange(len(bank_MD), device=bank_MD.device) >= filled
        # A large finite number: minus infinity would give NaN gradients if no row is in use.
        negative_NM = negative_NM.masked_fill(unused_M, torch.finfo(negative_NM.dtype).min / 2)
    negatives_N = negative_NM.logsumexp(dim=1)
    positive_PN = (z_ND * positives_PND.detach()).sum(dim=-1) / temperature
    return torch.logaddexp(positive_PN, negatives_N) - positive_PN


def decoupling_loss(
    student1_ND: Tensor,
    student2_ND: Tensor,
    teacher1_ND: Tensor,
    teacher2_ND: Tensor,
    bank_MD: Tensor,
    *,
    temperature: float = 0.2,
    filled: Tensor | None = None,
) -> Tensor:
    """L_dc of Eq. 4: each view's student regions against the other view's teacher regions.

    Args:
        student1_ND: the student's regions of view 1.
        student2_ND: the student's regions of view 2s.
        teacher1_ND: the teacher's regions of view 1.
        teacher2_ND: the teacher's regions of view 2.
        bank_MD: negatives.
        temperature: T.
        filled: rows of the bank in use; None: all.

    Returns:
        (N,), the sum of both directions.
    """
    first_1N = bank_nce(student1_ND, teacher2_ND[None], bank_MD, temperature=temperature, filled=filled)
    second_1N = bank_nce(student2_ND, teacher1_ND[None], bank_MD, temperature=temperature, filled=filled)
    return (first_1N + second_1N)[0]


def depositioning_loss(
    student3_ND: Tensor,
    teacher1_ND: Tensor,
    teacher2_ND: Tensor,
    bank_MD: Tensor,
    *,
    temperature: float = 0.2,
    filled: Tensor | None = None,
) -> Tensor:
    """L_dp of Eq. 9: the pasted regions of the student against the teacher's regions of both views.

    Args:
        student3_ND: the student's regions of view 3.
        teacher1_ND: the teacher's regions of view 1.
        teacher2_ND: the teacher's regions of view 2.
        bank_MD: negatives; their scores are computed once for both positives.
        temperature: T.
        filled: rows of the bank in use; None: all.

    Returns:
        (N,), the sum over both positives.
    """
    positives_2ND = torch.stack([teacher1_ND, teacher2_ND])
    return bank_nce(student3_ND, positives_2ND, bank_MD, temperature=temperature, filled=filled).sum(dim=0)
