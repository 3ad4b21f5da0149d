"""Batch norm whose statistics are those of the batch of all ranks, on a GPU and on a CPU.

torch's SyncBatchNorm refuses CPU tensors; this one hands over to it on a GPU and sums moments itself elsewhere, so
that several CPU processes train as one process with the whole batch does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class SyncBatchNorm(_BatchNorm):
    """Parameters, buffers and results are those of torch's class; ranks may hold different numbers of rows.

    Not a subclass of torch's, which DistributedDataParallel refuses on a CPU; on a GPU it calls that one's forward.
    """

    process_group = None  # all ranks
    _check_input_dim = nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, input: Tensor) -> Tensor:
        """The normalised input, (B, C) or (B, C, ...)."""
        synchronised = self.training or self.running_mean is None
        if input.is_cuda:
            return nn.SyncBatchNorm.forward(self, input)  # type: ignore[arg-type]  # all attributes that it reads are here
        if not synchronised or not dist.is_initialized() or dist.get_world_size() == 1:
            return _batch_norm(self, input)
        mean_C, var_C, count = _Moments.apply(input)
        if self.training and self.running_mean is not None:
            self._follow(mean_C.detach(), var_C.detach() * (count / (count - 1).clamp(min=1)))
        channels = (1, -1) + (1,) * (input.ndim - 2)
        scale_C = (var_C + self.eps).rsqrt()
        if self.affine:
            scale_C = scale_C * self.weight
        shift_C = -mean_C * scale_C + (self.bias if self.affine else 0)
        return (input * scale_C.view(channels) + shift_C.view(channels)).to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean_C: Tensor, unbiased_C: Tensor) -> None:
        """Running statistics, as torch keeps them."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased_C.to(self.running_var.dtype), share)


class SyncBatchNormAct(SyncBatchNorm):
    """timm's BatchNormAct2d: the norm, then what it drops and its activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """The normalised input through dropping and activation."""
        activated: Tensor = self.act(self.drop(super().forward(input)))
        return activated


def convert(module: nn.Module) -> nn.Module:
    """Replaces every batch norm inside, in place, keeping parameters, buffers and their names.

    Returns: `module`, or its replacement where it is a batch norm itself.
    """
    if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm | SyncBatchNorm):
        return _converted(module)
    for name, child in module.named_children():
        replacement = convert(child)
        if replacement is not child:
            module.add_module(name, replacement)
    return module


def _converted(norm: Any) -> SyncBatchNorm:
    kind = SyncBatchNormAct if isinstance(norm, BatchNormAct2d) else SyncBatchNorm
    sync = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    for name, parameter in norm._parameters.items():
        sync.register_parameter(name, parameter)
    for name, buffer in norm._buffers.items():
        sync.register_buffer(name, buffer)
    if isinstance(sync, SyncBatchNormAct):
        sync.drop, sync.act = norm.drop, norm.act
    return sync.train(norm.training)


def _batch_norm(norm: _BatchNorm, input: Tensor) -> Tensor:
    """Plain batch norm of this process's rows."""
    training = norm.training or norm.running_mean is None
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked += 1
    share = norm.momentum
    if share is None:
        share = 0.0 if norm.num_batches_tracked is None else 1 / max(1, norm.num_batches_tracked.item())
    return nn.functional.batch_norm(
        input, norm.running_mean, norm.running_var, norm.weight, norm.bias, training, share, norm.eps
    )


class _Moments(torch.autograd.Function):
    """Mean and biased variance (C,) of each channel over the rows of all ranks, and how many values those are."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        channels, wide = input.shape[1], torch.promote_types(input.dtype, torch.float32)
        values_CN = input.to(wide).transpose(0, 1).reshape(channels, -1)
        summed = torch.cat([values_CN.sum(dim=1), values_CN.new_tensor([values_CN.shape[1]])])
        dist.all_reduce(summed)
        count = summed[-1:]
        mean_C = summed[:-1] / count
        squares_C = (
            (values_CN - mean_C[:, None]).square().sum(dim=1)
        )  # around the common mean, so that no precision is lost
        dist.all_reduce(squares_C)
        ctx.save_for_backward(input, mean_C, count)
        ctx.mark_non_differentiable(count)
        return mean_C, squares_C / count, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # Every rank's output depends on every rank's rows: the gradients of the moments are summed over ranks.
        input, mean_C, count = ctx.saved_tensors
        summed_2C = torch.stack([grads[0], grads[1]])
        dist.all_reduce(summed_2C)
        channels = (1, -1) + (1,) * (input.ndim - 2)
        grad_mean, grad_var = (part.view(channels) / count for part in summed_2C)
        centred = input.to(mean_C.dtype) - mean_C.view(channels)
        return (grad_mean + 2 * grad_var * centred).to(input.dtype)
