"""CoTAP's ranking loss: exact value and gradient in O(n log n) time and O(n) memory.

Source: docs/methods.md#cotap-ranking-loss (Eq. 11 and 12).

For every patch pair i the loss needs a sum over {j : q_j < q_i} of h(p_i - p_j). The function h is a polynomial between
its two breakpoints, p_j = p_i and p_j = p_i - tau2. So it is enough to know the sums of 1, p_j and p_j^2 over
{j : q_j < q_i, p_j < x} for x = p_i and x = p_i - tau2. These are two-dimensional dominance sums; `dominated_sums`
computes them digit by digit. The gradient needs the opposite set {m : q_m > q_i}, with weights.

Everything is made of sorts, cumulative sums and gathers whose shapes do not depend on values. So it is batched over
image pairs, and the CPU never waits for the GPU.

Shape legend: B image pairs, N patch pairs of one image pair, S summands, E right ends of queries, R radix.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

# Patch pairs computed at once: as many as fit into a CPU core's cache; on a GPU, enough to fill it.
CHUNK = {"cpu": 1 << 14}
GPU_CHUNK = 1 << 21
RADIX_BITS = 2  # bits of a digit; 2 was the fastest of 1, 2, 3 (tests/benchmarks/RESULTS.md)


def cotap_ranking_loss(p_BN: Tensor, q_BN: Tensor, *, tau1: float = -0.2, tau2: float = 0.5) -> Tensor:
    """L_sc of Eq. 12 for each image pair: (B,). Differentiable in p; q, psi and the gains are constants.

    Source: docs/methods.md#cotap-ranking-loss (Eq. 11, with the minus sign that makes h continuous, and Eq. 12).

        L = (1/n) sum_i gain_i g(psi_i A_i),  g(x) = x / (1 + x),  gain_i = max(q_i - tau1, 0),
        A_i = sum_{j: q_j < q_i} h(p_i - p_j),  psi_i = 1 / #{j: q_j >= q_i, p_i <= p_j},
        h(d) = 1 - 2 d / tau2 for d < 0,  max(1 - d / tau2, 0)^2 for d >= 0.

    Args:
        p_BN: student similarities of the patch pairs, in any float type; the computation is in float64.
        q_BN: teacher similarities of the same patch pairs.
        tau1: teacher similarity below which a patch pair has no weight.
        tau2: margin of the surrogate h, > 0.

    Raises:
        ValueError: if the shapes differ or are not (B, N), or tau2 is not positive.

    Example:
        >>> p = torch.tensor([[0.9, 0.1]])
        >>> cotap_ranking_loss(p, torch.tensor([[0.8, 0.3]]), tau2=0.5)
        tensor([0.])
    """
    if p_BN.ndim != 2 or p_BN.shape != q_BN.shape:
        raise ValueError(f"p and q must both be (pairs, n), got {tuple(p_BN.shape)} and {tuple(q_BN.shape)}")
    if tau2 <= 0:
        raise ValueError(f"tau2 is the margin of the surrogate and must be positive, got {tau2}")
    loss_B: Tensor = _Ranking.apply(p_BN, q_BN.detach(), tau1, tau2)
    return loss_B


class _Ranking(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p_BN: Tensor, q_BN: Tensor, tau1: float, tau2: float) -> Tensor:
        losses: list[Tensor] = []
        grads: list[Tensor] = []
        pairs = max(1, CHUNK.get(p_BN.device.type, GPU_CHUNK) // max(1, p_BN.shape[1]))
        with torch.autocast(p_BN.device.type, enabled=False):
            for p, q in zip(torch.split(p_BN, pairs), torch.split(q_BN, pairs), strict=True):
                loss_B, grad_BN = _loss_and_gradient(p, q, tau1, tau2, ctx.needs_input_grad[0])
                losses.append(loss_B)
                grads += [] if grad_BN is None else [grad_BN]
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.cat(grads))
        return torch.cat(losses).to(torch.promote_types(p_BN.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_BN,) = ctx.saved_tensors
        return grad_BN * grads[0][:, None].to(grad_BN.dtype), None, None, None


def _loss_and_gradient(
    p_BN: Tensor, q_BN: Tensor, tau1: float, tau2: float, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    n = p_BN.shape[1]
    # From here on everything is in the order of p, in units of the margin, minus the mean (which keeps squares small).
    sorted_p_BN, order_BN = p_BN.sort(dim=1)
    sorted_p_BN = sorted_p_BN.double()
    y_BN = (sorted_p_BN - sorted_p_BN.mean(dim=1, keepdim=True)) / tau2
    q_BN = q_BN.gather(1, order_BN)
    sorted_q_BN, by_q_BN = q_BN.sort(dim=1)
    smaller_q_BN = torch.searchsorted(sorted_q_BN, q_BN)  # #{j: q_j < q_i}
    here_BN = torch.searchsorted(sorted_p_BN, sorted_p_BN)  # #{j: p_j < p_i}
    below_BN = torch.searchsorted(y_BN, y_BN - 1, right=True)  # #{j: p_j <= p_i - tau2}: h is 0 for those

    ones_BN = torch.ones_like(y_BN)
    summands_BSN = torch.stack([ones_BN, y_BN, y_BN * y_BN], dim=1)
    here_BSN, below_BSN = dominated_sums(smaller_q_BN, summands_BSN, torch.stack([here_BN, below_BN]))
    # Split {q_j < q_i} at p_i: h is linear where p_j >= p_i, quadratic where p_i - tau2 < p_j < p_i.
    running_y_BN = functional.pad(y_BN.gather(1, by_q_BN).cumsum(dim=1), (1, 0))
    all_y_BN = running_y_BN.gather(1, smaller_q_BN)  # sum of y_j over {q_j < q_i}
    count_BN, linear_y_BN = smaller_q_BN - here_BSN[:, 0], all_y_BN - here_BSN[:, 1]
    count2_BN, y2_BN, yy2_BN = (here_BSN - below_BSN).unbind(1)
    u_BN = 1 - y_BN
    linear_BN = (2 * u_BN - 1) * count_BN + 2 * linear_y_BN
    quadratic_BN = u_BN * u_BN * count2_BN + 2 * u_BN * y2_BN + yy2_BN
    negatives_BN = linear_BN + quadratic_BN  # A_i

    # 1 / psi counts, of the n - #{p_j < p_i} elements with p_j >= p_i, those that do not have a smaller q.
    psi_BN = 1 / ((n - here_BN) - count_BN).clamp(min=1)
    gain_BN = (q_BN.double() - tau1).clamp(min=0)
    x_BN = psi_BN * negatives_BN
    loss_B = (gain_BN * x_BN / (1 + x_BN)).mean(dim=1)
    if not with_gradient:
        return loss_B, None

    weight_BN = gain_BN * psi_BN / (1 + x_BN) ** 2
    # h' is -2 / tau2 where h is linear and -2 / tau2 (1 - d / tau2) where it is quadratic.
    own_BN = weight_BN * (count_BN + u_BN * count2_BN + y2_BN)
    # p_i is also the p_j of every m with q_m > q_i. There d = p_m - p_i is negative for p_m < p_i.
    larger_q_BN = n - torch.searchsorted(sorted_q_BN, q_BN, right=True)
    above_BN = torch.searchsorted(y_BN, y_BN + 1)  # #{m: p_m < p_i + tau2}
    weights_BSN = torch.stack([weight_BN, weight_BN * y_BN], dim=1)
    here_BSN, above_BSN = dominated_sums(larger_q_BN, weights_BSN, torch.stack([here_BN, above_BN]))
    w2_BN, wy2_BN = (above_BSN - here_BSN).unbind(1)
    others_BN = here_BSN[:, 0] + (1 + y_BN) * w2_BN - wy2_BN
    grad_BN = (others_BN - own_BN) * (2 / (tau2 * n))
    return loss_B, torch.zeros_like(grad_BN).scatter_(1, order_BN, grad_BN).to(p_BN.dtype)


def dominated_sums(level_BN: Tensor, summands_BSN: Tensor, ends_EBN: Tensor) -> Tensor:
    """For every i and every end e_i: the sums over {j < e_i : level_j < level_i}.

    The algorithm is a wavelet matrix. The elements are sorted stably by the first digit of their level, then by the
    next one, and so on. A query follows the digits of its own level. At each digit it adds the sum of the elements
    that share all earlier digits and have a smaller one, which it looks up in cumulative sums. Then its end moves to
    the place where the elements before it were moved by the sort.

    Args:
        level_BN: integers in [0, N).
        summands_BSN: the values to sum, float64.
        ends_EBN: integers in [0, N]; positions in the order of `level_BN`.

    Returns:
        (E, B, S, N).
    """
    ends, (batch, terms, n) = len(ends_EBN), summands_BSN.shape
    radix, device, stride = 1 << RADIX_BITS, level_BN.device, n + 1
    digits = max(1, -(-max(1, (n - 1).bit_length()) // RADIX_BITS))
    # The E ends lie side by side, so that one gather looks up all queries of an image pair.
    ends_BX = ends_EBN.transpose(0, 1).flatten(1)
    sums_BSX = summands_BSN.new_zeros(batch, terms, ends * n)
    # The sum before a block of equal leading digits is subtracted at the end, once for each value of a level.
    before_BSV = summands_BSN.new_zeros(batch, terms, radix**digits)
    starts_BK = level_BN.new_zeros(batch, 1)  # where each block starts, blocks in the order of their digits
    digit_R1 = torch.arange(radix, device=device)[:, None]
    index_N = torch.arange(n, device=device)
    element_BN = level_BN
    # At [d, x]: the sum of elements before x with a digit below d, and the new place of an element at x with digit d.
    less_BSRN = summands_BSN.new_zeros(batch, terms, radix, stride)
    moved_BRN = level_BN.new_zeros(batch, radix, stride)
    for shift in range(RADIX_BITS * (digits - 1), -1, -RADIX_BITS):
        digit_BN = (element_BN >> shift) & (radix - 1)
        for d in range(1, radix):
            torch.cumsum(summands_BSN * (digit_BN < d)[:, None], dim=2, out=less_BSRN[:, :, d, 1:])
        row_BX = (((level_BN >> shift) & (radix - 1)) * stride).repeat(1, ends)
        where_BX = row_BX + ends_BX
        begin_BY = (digit_R1 * stride + starts_BK[:, None]).flatten(1)  # the same look-up at the block starts
        less_BSY = less_BSRN.flatten(2)
        sums_BSX += less_BSY.gather(2, where_BX[:, None].expand(-1, terms, -1))
        begun_BSRK = less_BSY.gather(2, begin_BY[:, None].expand(-1, terms, -1)).reshape(batch, terms, radix, -1)
        before_BSV.view(batch, terms, starts_BK.shape[1], radix, -1).add_(begun_BSRK.transpose(2, 3)[..., None])
        if shift == 0:
            break
        torch.cumsum(digit_BN[:, None] == digit_R1, dim=2, out=moved_BRN[:, :, 1:])
        moved_BRN[:, :, 0] = 0
        total_BR = moved_BRN[:, :, -1]
        moved_BRN += (total_BR.cumsum(dim=1) - total_BR)[:, :, None]
        moved_BY = moved_BRN.flatten(1)
        target_BN = moved_BY.gather(1, digit_BN * stride + index_N)
        ends_BX = moved_BY.gather(1, where_BX)
        starts_BK = moved_BY.gather(1, begin_BY).reshape(batch, radix, -1).transpose(1, 2).flatten(1)
        element_BN = torch.empty_like(element_BN).scatter_(1, target_BN, element_BN)
        target_BSN = target_BN[:, None].expand(-1, terms, -1)
        summands_BSN = torch.empty_like(summands_BSN).scatter_(2, target_BSN, summands_BSN)
    before_BSN = before_BSV.gather(2, level_BN[:, None].expand(-1, terms, -1))
    return (sums_BSX.reshape(batch, terms, ends, n) - before_BSN[:, :, None]).permute(2, 0, 1, 3)
