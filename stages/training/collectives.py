"""Sums, means and gathers over ranks (the processes of one training); with a single rank they change nothing.

Every rank must make the same calls in the same order. Losses get these functions as arguments: only methods and the
loop know that there are ranks.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Number of ranks, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank, 0 without torch.distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_reduce_sum(value: Tensor) -> Tensor:
    """Sum over ranks, without gradient; `value` is left as it was."""
    return _reduced(value, dist.ReduceOp.SUM)


def all_reduce_max(value: Tensor) -> Tensor:
    """Maximum over ranks, without gradient; `value` is left as it was."""
    return _reduced(value, dist.ReduceOp.MAX)


def highest(values: Tensor) -> list[float]:
    """The largest of each number over all ranks; waits for the device. What ranks decide together goes through this."""
    found: list[float] = all_reduce_max(values).tolist()
    return found


def all_reduce_mean(value: Tensor) -> Tensor:
    """Mean over ranks, with gradient.

    The backward pass is the mean of the ranks' gradients: with DDP, which averages parameter gradients over ranks,
    a loss of the global mean then gets the gradient that one process with the whole batch would compute.
    """
    if world_size() == 1:
        return value
    mean: Tensor = _MeanOverRanks.apply(value)
    return mean


def gather(value: Tensor) -> Tensor:
    """Rows of all ranks in rank order, (n_0 + n_1 + ..., ...), without gradient; n_r may differ between ranks."""
    if world_size() == 1:
        return value.detach()
    counts = [torch.zeros(1, dtype=torch.long, device=value.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(value)], device=value.device))
    most = int(torch.cat(counts).max())
    padded = value.new_zeros(most, *value.shape[1:])
    padded[: len(value)] = value.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def gather_objects(value: T) -> list[T]:
    """What every rank passed, in rank order. `value` is anything that pickles."""
    if world_size() == 1:
        return [value]
    values = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_with_gradient(value: Tensor) -> Tensor:
    """Rows of all ranks, (ranks * n, ...), in rank order. Every rank holds the same number of rows.

    The backward pass sums the ranks' gradients of a row. Where every rank computes the same loss from all rows, or
    each rank its own images' share of it (`Trainable.compute_terms`), DDP's average is then the gradient that one
    process with the whole batch would compute.
    """
    if world_size() == 1:
        return value
    rows: Tensor = _RowsOfAllRanks.apply(value)
    return rows


def _reduced(value: Tensor, operation: Any) -> Tensor:
    if world_size() == 1:
        return value.detach()
    value = value.detach().clone()
    dist.all_reduce(value, op=operation)
    return value


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return all_reduce_sum(value) / world_size()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return all_reduce_sum(grads[0]) / world_size()


class _RowsOfAllRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.count = len(value)
        parts = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, value.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        start = rank() * ctx.count
        return all_reduce_sum(grads[0].contiguous())[start : start + ctx.count]
