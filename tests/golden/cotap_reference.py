"""CoTAP's ranking quantities as slow, obvious double loops: Eq. 9, Eq. 10, Proposition 1, Eq. 11, Eq. 12."""

from __future__ import annotations

import torch
from torch import Tensor


def g(x: Tensor) -> Tensor:
    return x / (1 + x)


def surrogate(d: Tensor, tau2: float) -> Tensor:
    """h of Eq. 11, with the minus sign that makes it continuous."""
    return torch.where(d < 0, 1 - 2 * d / tau2, (1 - d / tau2).clamp(min=0) ** 2)


def ap_loss(p: Tensor, q: Tensor, threshold: float) -> Tensor:
    """Eq. 9: one minus the average precision of {q >= threshold}, ties counting against."""
    positive = q >= threshold
    not_below = p[:, None] <= p[None, :]  # [i, j]: p_i <= p_j
    right = (not_below & positive[None]).sum(1)[positive].double()
    wrong = (not_below & ~positive[None]).sum(1)[positive].double()
    return (wrong / (right + wrong)).mean()


def exact_loss(p: Tensor, q: Tensor, gamma: Tensor) -> Tensor:
    """Eq. 10: the AP loss of every threshold q_k, weighted by gamma(q_k)."""
    return torch.stack([gamma[k] * ap_loss(p, q, q[k].item()) for k in range(len(q))]).mean()


def cumulated_gain(q: Tensor, gamma: Tensor) -> Tensor:
    """gamma tilde_i: the sum of gamma(q_k) / r_k over q_k <= q_i, with r_k = #{q_j >= q_k}."""
    rank = (q[None] >= q[:, None]).sum(1)
    return ((q[None] <= q[:, None]) * (gamma / rank)[None]).sum(1)


def psi(p: Tensor, q: Tensor) -> Tensor:
    return 1 / ((q[None] >= q[:, None]) & (p[:, None] <= p[None])).sum(1).double()


def upper_bound(p: Tensor, q: Tensor, gain: Tensor) -> Tensor:
    """Proposition 1 with the indicator."""
    wrong = ((q[None] < q[:, None]) & (p[:, None] <= p[None])).sum(1)
    return (gain * g(psi(p, q) * wrong)).mean()


def negative_sums(p: Tensor, q: Tensor, tau2: float) -> Tensor:
    """A_i of Eq. 12."""
    return ((q[None] < q[:, None]) * surrogate(p[:, None] - p[None], tau2)).sum(1)


def training_loss(p: Tensor, q: Tensor, tau1: float, tau2: float) -> Tensor:
    """Eq. 12; autograd gives its gradient."""
    return ((q - tau1).clamp(min=0) * g(psi(p, q).to(p.dtype) * negative_sums(p, q, tau2))).mean()


class RowChunked(torch.autograd.Function):
    """Eq. 12 as a double loop over rows of the n x n matrix, recomputed in backward: the benchmark's alternative.

    `stop` ends both loops after that many rows, to time a part.
    """

    @staticmethod
    def forward(ctx, p: Tensor, q: Tensor, tau1: float, tau2: float, rows: int, stop: int | None = None) -> Tensor:  # type: ignore[no-untyped-def]
        n, total = len(p), p.new_zeros(())
        weight = torch.zeros_like(p)
        for i in range(0, stop or n, rows):
            d = p[i : i + rows, None] - p[None]
            smaller = q[None] < q[i : i + rows, None]
            inner = torch.where(smaller, surrogate(d, tau2), 0).sum(1)
            psi_rows = 1 / (~smaller & (d <= 0)).sum(1).to(p.dtype)
            gain = (q[i : i + rows] - tau1).clamp(min=0)
            weight[i : i + rows] = gain * psi_rows / (1 + psi_rows * inner) ** 2
            total += (gain * g(psi_rows * inner)).sum()
        ctx.save_for_backward(p, q, weight)
        ctx.tau2, ctx.rows, ctx.stop = tau2, rows, stop or n
        return total / n

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        p, q, weight = ctx.saved_tensors
        out = torch.zeros_like(p)
        for i in range(0, ctx.stop, ctx.rows):
            d = p[i : i + ctx.rows, None] - p[None]
            slope = torch.where(d < 0, 1.0, (1 - d / ctx.tau2).clamp(min=0)) * (-2 / ctx.tau2)
            slope = torch.where(q[None] < q[i : i + ctx.rows, None], slope, 0) * weight[i : i + ctx.rows, None]
            out[i : i + ctx.rows] += slope.sum(1)
            out -= slope.sum(0)
        return grad * out / len(p), None, None, None, None, None
