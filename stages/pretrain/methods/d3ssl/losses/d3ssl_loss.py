"""D3SSL's region contrast against a memory bank (docs/methods.md#d3ssl-losses, Eq. 4, 5 and 9).

Shape legend: N regions, D width, M rows of the bank, P positives of each region.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bank_nce(
    z_ND: Tensor, positives_PND: Tensor, bank_MD: Tensor, *, temperature: float = 0.2, filled: Tensor | None = None
) -> Tensor:
    """Eq. 5 for several positives of the same regions: -log exp(z z+ / T) / (exp(z z+ / T) + sum_neg exp(z z- / T)).

    Negatives are the bank's rows alone: neither the other regions nor the other positives are.

    Args:
        z_ND: unit vectors of the student, the only ones that get a gradient.
        positives_PND, bank_MD: unit vectors of the teacher.
        filled: 0-d integer, rows of the bank in use; None: all. With none, the loss is 0.

    Returns: (P, N), each >= 0.
    """
    negative_NM = z_ND @ bank_MD.detach().T / temperature
    if filled is not None:
        unused_M = torch.arange(len(bank_MD), device=bank_MD.device) >= filled
        # A large finite number: with minus infinity, a bank without any row would give NaN gradients.
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
    """L_dc (Eq. 4), (N,): each view's student region against the other view's teacher region."""
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
    """L_dp (Eq. 9), (N,): the pasted region against both teacher regions; the bank is compared with once."""
    positives_2ND = torch.stack([teacher1_ND, teacher2_ND])
    return bank_nce(student3_ND, positives_2ND, bank_MD, temperature=temperature, filled=filled).sum(dim=0)
