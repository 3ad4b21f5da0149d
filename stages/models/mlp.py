"""The plain MLPs of two-view methods: projectors and predictors, with or without batch norm."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

from torch import nn


def mlp(
    widths: Sequence[int], *, norm: bool = True, end: Literal["plain", "norm", "fixed_norm"] = "plain"
) -> nn.Module:
    """Linear layers with ReLU between them.

    Args:
        widths: of the input, of every hidden layer, of the output.
        norm: batch norm before every ReLU.
        end: what follows the last layer: nothing, a batch norm, or one without scale and shift. Layers before a batch
            norm have no bias.

    Example: `mlp([2048, 2048, 128], end="norm")` is SimCLR's projector.
    """
    parts: list[nn.Module] = []
    last = len(widths) - 2
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        normed = norm if i < last else end != "plain"
        parts.append(nn.Linear(fan_in, fan_out, bias=not normed))
        if normed:
            parts.append(nn.BatchNorm1d(fan_out, affine=i < last or end == "norm"))
        if i < last:
            parts.append(nn.ReLU(inplace=True))
    return nn.Sequential(*parts)
