"""Schedules: numbers as functions of the step, looked up every step
(docs/methods.md#ema-and-schedules; DINO's scheduler)."""

from __future__ import annotations

import math


def cosine(step: int, total: int, base: float, final: float, *, warmup: int = 0, start: float = 0.0) -> float:
    """Linear from `start` to `base` over `warmup` steps (both ends included), then a half cosine towards `final`.

    `final` itself is never reached: the cosine's argument is t / (total - warmup) with t < total - warmup.

    Args:
        step: 0-based; steps past the end keep the last value.
        total: steps of the whole run, warm-up included.

    Example:
        >>> cosine(0, 100, 1.0, 0.0)
        1.0
    """
    if step < warmup:
        return start + (base - start) * step / max(1, warmup - 1)
    span = max(1, total - warmup)
    t = min(step - warmup, span - 1)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * t / span))


def linear_warmup(epoch: int, start: float, end: float, warmup_epochs: int) -> float:
    """linspace(start, end, warmup_epochs) by epoch, then `end`: DINO's teacher temperature."""
    if epoch >= warmup_epochs:
        return end
    return start + (end - start) * epoch / max(1, warmup_epochs - 1)
