"""Schedules: numbers as functions of the step, looked up every step, as DINO's scheduler gives them.

docs/methods.md#ema-and-schedules says where they come from.
"""

from __future__ import annotations

import math


def cosine(step: int, total: int, base: float, final: float, *, warmup: int = 0, start: float = 0.0) -> float:
    """Linear from `start` to `base` over `warmup` steps (both ends included), then a half cosine towards `final`.

    `final` itself is never reached: the cosine's argument is t / (total - warmup) with t < total - warmup.

    Args:
        step: 0-based; steps past the end keep the last value.
        total: steps of the whole training, warm-up included.
        base: value at the end of the warm-up, or at step 0 without one.
        final: what the cosine falls (or rises) towards.
        warmup: steps of the linear part.
        start: value at step 0 where there is a warm-up.

    Example:
        >>> cosine(0, 100, 1.0, 0.0)
        1.0
    """
    if step < warmup:
        return start + (base - start) * step / max(1, warmup - 1)
    span = max(1, total - warmup)
    t = min(step - warmup, span - 1)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * t / span))


def power(
    step: int, total: int, base: float, final: float, exponent: float, *, warmup: int = 0, start: float = 0.0
) -> float:
    """As `cosine`, with (1 - t / T) to an exponent in place of the half cosine: mmsegmentation's "poly".

    Args:
        step: 0-based; steps past the end keep the last value.
        total: steps of the whole training, warm-up included.
        base: value at the end of the warm-up, or at step 0 without one.
        final: what it falls towards.
        exponent: 1 is a straight line.
        warmup: steps of the linear part.
        start: value at step 0 where there is a warm-up.
    """
    if step < warmup:
        return start + (base - start) * step / max(1, warmup - 1)
    span = max(1, total - warmup)
    t = min(step - warmup, span - 1)
    return final + (base - final) * (1 - t / span) ** exponent


def linear_warmup(epoch: int, start: float, end: float, warmup_epochs: int) -> float:
    """DINO's teacher temperature: linspace(start, end, warmup_epochs) by epoch, then `end`.

    Args:
        epoch: 0-based.
        start: value in epoch 0.
        end: value from epoch `warmup_epochs` - 1 on.
        warmup_epochs: number of points of the line, both ends included.
    """
    if epoch >= warmup_epochs:
        return end
    return start + (end - start) * epoch / max(1, warmup_epochs - 1)
