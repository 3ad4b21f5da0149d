"""Two faults of dense features, as D3SSL measures them: coupling and position bias.

Source: docs/methods.md#coupling-and-position-bias.

Shape legend: N pairs or grids, D width.
"""

from __future__ import annotations

import torch.nn.functional as functional
from torch import Tensor


def coupling_rate(together_ND: Tensor, alone_ND: Tensor, other_ND: Tensor, *, smallest: float = 1e-3) -> Tensor:
    """CR of each usable pair: cos(A beside B, B) / cos(A alone, B). 1: B does not change A's features; more is worse.

    Args:
        together_ND: region features of object A, in an image that shows A and B.
        alone_ND: region features of A at the same place, in an image without B.
        other_ND: region features of B, in the first image.
        smallest: pairs whose denominator is closer to 0 than this are left out.

    Returns: at most N numbers; average over them.
    """
    coupled_N = functional.cosine_similarity(together_ND, other_ND, dim=1)
    free_N = functional.cosine_similarity(alone_ND, other_ND, dim=1)
    usable_N = free_N.abs() >= smallest
    return coupled_N[usable_N] / free_N[usable_N]


def mean_cosine_similarity(grid_N9D: Tensor) -> Tensor:
    """MCS of each grid, (N,): the mean cosine of the middle tile with the 8 around it, all showing the same crop.

    1 means that features do not depend on the position. Tiles are in raster order, the middle one is number 4.
    """
    cosine_N9 = functional.cosine_similarity(grid_N9D, grid_N9D[:, 4:5], dim=2)
    return (cosine_N9.sum(dim=1) - cosine_N9[:, 4]) / 8
