"""The optimiser of a training: parameter groups, a step's learning rate and weight decay, gradient clipping."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stages.training.contract import Trainable
from stages.training.schedules import cosine, power
from stages.training.settings import OptimizerSettings


def build_optimizer(module: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """An optimiser whose groups are weights, and biases with norms (tensors of at most one dimension).

    Biases and norms have no weight decay unless `decay_all`, and a learning rate of their own with `lr_biases`. LARS
    adapts the rate of the tensors that decay. A `Trainable` may give parameters another share of the learning rate,
    each share being a group, and may count tensors among those without decay.
    """
    trained = module if isinstance(module, Trainable) else None
    members: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            like_bias = (
                parameter.ndim <= 1 or name.endswith(".bias") or (trained is not None and trained.undecayed(name))
            )
            share = 1.0 if trained is None else trained.share_of_lr(name)
            members.setdefault((like_bias, share), []).append(parameter)
    bias_share = 1.0 if settings.lr_biases is None else settings.lr_biases / settings.lr
    groups: list[dict[str, Any]] = [
        {
            "params": parameters,
            "decayed": settings.decay_all or not like_bias,
            "weight_decay": settings.weight_decay if settings.decay_all or not like_bias else 0.0,
            "share_of_lr": share * (bias_share if like_bias else 1.0),
        }
        for (like_bias, share), parameters in sorted(members.items(), key=lambda member: member[0][0])
    ]
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas)
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)
    from timm.optim.lars import Lars

    for group in groups:
        group["always_adapt"] = group["decayed"]  # by itself it adapts only what has a weight decay that is not 0
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
        The learning rate and the weight decay of the weights.
    """
    peak = settings.lr * (batch_size / settings.lr_per if settings.lr_per else 1.0)
    warmup = min(total, settings.warmup_steps or round(settings.warmup_epochs * steps_per_epoch))
    if settings.lr_power is not None:
        lr = power(step, total, peak, settings.lr_end, settings.lr_power, warmup=warmup, start=settings.lr_start)
    else:
        # Dropped by steps, a learning rate is constant between them: the warm-up of a cosine that ends where it starts.
        end = peak if settings.lr_drops else settings.lr_end
        lr = cosine(step, total, peak, end, warmup=warmup, start=settings.lr_start)
    lr *= settings.lr_drop ** sum(step >= total - round(drop * steps_per_epoch) for drop in settings.lr_drops)
    end = settings.weight_decay if settings.weight_decay_end is None else settings.weight_decay_end
    decay = cosine(step, total, settings.weight_decay, end)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["share_of_lr"]
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
    if isinstance(norms, DTensor):  # each rank holds a part of every gradient; a norm is that of all parts
        norms = norms.full_tensor()
        gradients = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    total = torch.linalg.vector_norm(norms)
    if settings.clip is not None:
        if settings.clip_mode == "tensor":
            factors = (settings.clip / (norms + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, list(factors.unbind()))
        else:
            torch._foreach_mul_(gradients, (settings.clip / (total + 1e-6)).clamp(max=1.0))
    return total
