"""The optimiser of a training: parameter groups, a step's learning rate and weight decay, gradient clipping."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from stages.training.schedules import cosine
from stages.training.settings import OptimizerSettings


def build_optimizer(module: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """An optimiser with two groups: parameters with weight decay and parameters without.

    Biases and tensors with at most one dimension (norms) have none, unless `decay_all`. A group without parameters is
    left out.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        is_plain = parameter.ndim <= 1 or name.endswith(".bias")
        (plain if is_plain and not settings.decay_all else decayed).append(parameter)
    groups: list[dict[str, object]] = [
        {"params": decayed, "weight_decay": settings.weight_decay, "decayed": True},
        {"params": plain, "weight_decay": 0.0, "decayed": False},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas)
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)
    from timm.optim.lars import Lars

    return Lars(groups, lr=settings.lr, momentum=settings.momentum, trust_coeff=settings.trust)


def set_schedule(
    optimizer: torch.optim.Optimizer,
    settings: OptimizerSettings,
    *,
    step: int,
    total: int,
    steps_per_epoch: int,
    batch_size: int,
) -> tuple[float, float]:
    """Put a step's learning rate and weight decay into the optimiser's groups.

    Args:
        optimizer: made by `build_optimizer`.
        settings: the peak values, and what they start from and end at.
        step: 0-based.
        total: steps of the whole training.
        steps_per_epoch: optimiser steps of one epoch: the warm-up is given in epochs.
        batch_size: images of one optimiser step over all ranks, which may scale the learning rate.

    Returns:
        The learning rate and the weight decay.
    """
    scale = batch_size / settings.lr_per if settings.lr_per else 1.0
    warmup = min(total, round(settings.warmup_epochs * steps_per_epoch))
    lr = cosine(step, total, settings.lr * scale, settings.lr_end, warmup=warmup, start=settings.lr_start)
    end = settings.weight_decay if settings.weight_decay_end is None else settings.weight_decay_end
    decay = cosine(step, total, settings.weight_decay, end)
    for group in optimizer.param_groups:
        group["lr"] = lr
        if group["decayed"]:
            group["weight_decay"] = decay
    return lr, decay


def clip_gradients(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> Tensor:
    """Clip gradients in place, without waiting for the device.

    `clip_mode` "tensor" scales each gradient to a norm of at most `clip` by clip / (norm + 1e-6), as DINO does;
    "global" scales all of them together (as torch.nn.utils.clip_grad_norm_).

    Returns:
        The norm of all gradients together before clipping, a scalar on their device.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    total = torch.linalg.vector_norm(norms)
    if settings.clip is not None:
        if settings.clip_mode == "tensor":
            factors = (settings.clip / (norms + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, list(factors.unbind()))
        else:
            torch._foreach_mul_(gradients, (settings.clip / (total + 1e-6)).clamp(max=1.0))
    return total
