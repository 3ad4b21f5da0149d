"""CoTAP's training loss (Eq. 11 and 12) as slow, obvious double loops: what the fast one is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def g(x: Tensor) -> Tensor:
    """How a pair's weighted count of wrong pairs becomes a loss below 1."""
    return x / (1 + x)


def surrogate(d: Tensor, tau2: float) -> Tensor:
    """h of Eq. 11, with the minus sign that makes it continuous."""
    return torch.where(d < 0, 1 - 2 * d / tau2, (1 - d / tau2).clamp(min=0) ** 2)


def psi(p: Tensor, q: Tensor) -> Tensor:
    """One over the number of pairs that are rightly not below pair i, itself included."""
    return 1 / ((q[None] >= q[:, None]) & (p[:, None] <= p[None])).sum(1).double()


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
