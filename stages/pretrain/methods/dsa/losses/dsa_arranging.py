"""DSA's arranging module: a learned similarity M of pairs, and the loss that attracts or repels pairs by it.

Source: docs/methods.md#dsa-arranging-module.

Every function takes some anchors against all representations, so that each rank computes its own anchors only.

Shape legend: I anchors (of this rank), J all 2N representations of the batch, D width, H hidden units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as functional
from torch import Tensor

Activation = Literal["exp", "softplus", "relu"]

# Hidden values held at once: as many as fit into a CPU core's cache; on a GPU, enough to fill it.
CHUNK = {"cpu": 1 << 20}
GPU_CHUNK = 1 << 26


def pair_scores(first_IH: Tensor, second_JH: Tensor, output_H: Tensor) -> Tensor:
    """sum_h output_h ReLU(first_ih + second_jh): (I, J).

    With W1 = [Wa Wb], first = z_I Wa^T + b1 and second = z_J Wb^T, this is the two-layer f_s(concat(z_i, z_j)) of
    Eq. 9 without its last bias. The concatenations are never made, and the hidden units of a few anchors only exist at
    a time: memory is (I, J), not (I, J, H), also in the backward pass.

    Example:
        >>> pair_scores(torch.tensor([[1.0], [-3.0]]), torch.tensor([[2.0]]), torch.tensor([0.5]))
        tensor([[1.5000],
                [0.0000]])
    """
    scores_IJ: Tensor = _PairScores.apply(first_IH, second_JH, output_H)
    return scores_IJ


def arrange(scores_IJ: Tensor, activation: Activation = "exp") -> Tensor:
    """M of Eq. 9: rows of positive weights that sum to 1 over all J, the anchor itself included.

    Eq. 9 normalises raw scores, which may be negative, so they are made positive first. `exp` (a softmax) does it as
    the prior does. `relu` (plus 1e-8) is the printed network with a ReLU at its end.
    """
    if activation == "exp":
        return torch.softmax(scores_IJ, dim=1)
    positive_IJ = functional.softplus(scores_IJ) if activation == "softplus" else scores_IJ.relu() + 1e-8
    return positive_IJ / positive_IJ.sum(dim=1, keepdim=True)


def arranging_loss(
    m_IJ: Tensor,
    distance_IJ: Tensor,
    score_I: Tensor,
    *,
    alpha: float = 1.0,
    tau: float = 1.0,
    join: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """L_AM^s of Eq. 16: log(1 + sum_i sc_i sum_j exp((2 M_ij - alpha) D_ij / tau)), a scalar.

    Args:
        m_IJ: the learned similarity M.
        distance_IJ: D_ij = ||z_i - z_j||, not squared, as printed; 0 for the anchor itself, which adds exp(0).
        score_I: sc_i, the quality of each anchor in [0, 1], without gradient; ones give L_AM of Eq. 10.
        alpha: pairs with 2 M > alpha attract, the others repel.
        tau: temperature.
        join: concatenates a tensor of one element from every rank, with gradient; None if all anchors are here.
    """
    exponent_IJ = (2 * m_IJ - alpha) * distance_IJ / tau
    nothing = torch.finfo(exponent_IJ.dtype).min
    log_score_I = torch.where(score_I > 0, score_I, 1.0).log()
    weighted_IJ = torch.where(score_I[:, None] > 0, exponent_IJ + log_score_I[:, None], nothing)
    sums_R = torch.logsumexp(weighted_IJ.flatten(), dim=0, keepdim=True)
    if join is not None:
        sums_R = join(sums_R)
    return torch.logsumexp(torch.cat([sums_R.new_zeros(1), sums_R]), dim=0)


def constraint_loss(m_IJ: Tensor, prior_IJ: Tensor) -> Tensor:
    """L_con of Eq. 13: ||M_pre - M||_F^2, the sum over these anchors. The prior gets no gradient."""
    return (prior_IJ.detach() - m_IJ).square().sum()


def pair_distances(z_ID: Tensor, z_JD: Tensor) -> Tensor:
    """Euclidean distances (I, J), from one matrix product, and two in the backward pass.

    Memory is (I, J); the gradient of torch's cdist needs (I, J, D). Distances that rounding cannot tell from 0 are 0
    and have gradient 0: those on the diagonal, where the root would give NaN, and those of equal views.
    """
    distance_IJ: Tensor = _Distances.apply(z_ID, z_JD)
    return distance_IJ


class _Distances(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_ID: Tensor, z_JD: Tensor) -> Tensor:
        sizes_IJ = z_ID.square().sum(dim=1)[:, None] + z_JD.square().sum(dim=1)
        squared_IJ = sizes_IJ - 2 * (z_ID @ z_JD.T)
        noise_IJ = 4 * torch.finfo(z_ID.dtype).eps * sizes_IJ
        distance_IJ = torch.where(squared_IJ > noise_IJ, squared_IJ, 0).sqrt_()
        ctx.save_for_backward(z_ID, z_JD, distance_IJ)
        return distance_IJ

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        z_ID, z_JD, distance_IJ = ctx.saved_tensors
        pull_IJ = torch.where(distance_IJ > 0, grads[0] / distance_IJ, 0)
        return (
            z_ID * pull_IJ.sum(dim=1, keepdim=True) - pull_IJ @ z_JD,
            z_JD * pull_IJ.sum(dim=0)[:, None] - pull_IJ.T @ z_ID,
        )


class _PairScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first_IH: Tensor, second_JH: Tensor, output_H: Tensor) -> Tensor:
        ctx.save_for_backward(first_IH, second_JH, output_H)
        rows = [
            torch.relu_(part_iH[:, None] + second_JH) @ output_H for part_iH in torch.split(first_IH, _rows(second_JH))
        ]
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first_IH, second_JH, output_H = ctx.saved_tensors
        # Sums of the gradient over the pairs in which a hidden unit is above 0: all three gradients follow from them.
        on_IH, on_JH = [], torch.zeros_like(second_JH)
        size, off_JH = _rows(second_JH), -second_JH
        for part_iH, grad_iJ in zip(torch.split(first_IH, size), torch.split(grads[0], size), strict=True):
            on_iJH = (part_iH[:, None] > off_JH).to(grad_iJ.dtype)
            on_IH.append(torch.bmm(grad_iJ[:, None], on_iJH).squeeze(1))
            on_JH += on_iJH.mul_(grad_iJ[:, :, None]).sum(dim=0)
        sums_IH = torch.cat(on_IH)
        grad_output_H = (first_IH * sums_IH).sum(dim=0) + (second_JH * on_JH).sum(dim=0)
        return sums_IH * output_H, on_JH * output_H, grad_output_H


def _rows(second_JH: Tensor) -> int:
    return max(1, CHUNK.get(second_JH.device.type, GPU_CHUNK) // max(1, second_JH.numel()))
