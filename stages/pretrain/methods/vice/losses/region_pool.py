"""One vector for each region of a batch: the mean of its pixels, or the pixel with the highest score.

Source: docs/methods.md#vice-terms.

All regions of all views are pooled at once. A region is a number in an index map, not a mask of its own.

Shape legend: N views of all images, D width, H W sides of a map, P = N*H*W pixels, R regions of all N together,
K prototypes.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as functional
from torch import Tensor

PoolOrder = Literal["mean_then_norm", "norm_then_mean"]


def pool_regions(map_NDHW: Tensor, index_NHW: Tensor, regions: int, *, order: PoolOrder = "mean_then_norm") -> Tensor:
    """z*, the embedding of each region (Eq. 1).

    Args:
        map_NDHW: embeddings of pixels; fastest in the memory format `channels_last`.
        index_NHW: int64, the region of each pixel, -1 if it has none; every number from 0 to R - 1 has a pixel.
        regions: R.
        order: "mean_then_norm": the mean of the vectors, then brought to length 1 (the official code).
            "norm_then_mean": the mean of the vectors brought to length 1, at most 1 long (the paper).

    Returns:
        (R, D).

    Example:
        >>> rows = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 8.0]])
        >>> pool_regions(rows.T[None, :, :, None], torch.tensor([[[0], [0], [1]]]), 2)
        tensor([[0.6000, 0.8000],
                [0.0000, 1.0000]])
    """
    pixels_PD, index_P = pixel_rows(map_NDHW), index_NHW.reshape(-1)
    if order == "norm_then_mean":
        return region_means(functional.normalize(pixels_PD, dim=1), index_P, regions)
    return functional.normalize(region_means(pixels_PD, index_P, regions), dim=1)


def region_means(values_PD: Tensor, index_P: Tensor, regions: int) -> Tensor:
    """The mean of the rows of each region, (R, D). A row whose index is -1 belongs to none."""
    slot_P = torch.where(index_P < 0, regions, index_P)  # an extra row takes the rest, so that the CPU need not wait
    sums = values_PD.new_zeros(regions + 1, values_PD.shape[1]).index_add(0, slot_P, values_PD)
    counts = values_PD.new_zeros(regions + 1).index_add_(0, slot_P, values_PD.new_ones(()).expand(len(slot_P)))
    return sums[:regions] / counts[:regions, None].clamp(min=1)


def representatives(unit_PD: Tensor, index_P: Tensor, regions: int, prototypes_KD: Tensor) -> Tensor:
    """The pixel of each region with the highest score against any prototype; of equal ones the first.

    The released COCO configs use it in place of the mean. Only this pixel gets a gradient.

    Args:
        unit_PD: embeddings of pixels, of length 1.
        index_P: the region of each pixel, -1 if it has none.
        regions: R.
        prototypes_KD: the prototypes, of length 1.

    Returns:
        (R, D).
    """
    with torch.no_grad():
        score_P = (unit_PD @ prototypes_KD.T).amax(dim=1)
        slot_P = torch.where(index_P < 0, regions, index_P)
        best = score_P.new_full((regions + 1,), -torch.inf).scatter_reduce(0, slot_P, score_P, "amax")
        at_P = torch.arange(len(score_P), device=score_P.device)
        at_P = torch.where(score_P == best[slot_P], at_P, len(score_P) - 1)
        chosen = slot_P.new_full((regions + 1,), len(score_P) - 1).scatter_reduce(0, slot_P, at_P, "amin")
    return unit_PD[chosen[:regions]]


def coherence(unit_PD: Tensor, index_P: Tensor, representative_RD: Tensor) -> Tensor:
    """The mean distance of each region's pixels from its representative, which gets no gradient: (R,).

    The distance is torch's `pairwise_distance`, as in the official code. It adds an epsilon to every difference, so
    the representative's own pixel has a small distance and gradient too.
    """
    regions = len(representative_RD)
    target_PD = representative_RD.detach()[index_P.clamp(min=0)]
    distance_P = functional.pairwise_distance(unit_PD, target_PD)
    return region_means(distance_P[:, None], index_P, regions)[:, 0]


def pixel_rows(map_NDHW: Tensor) -> Tensor:
    """The pixels of a map, row by row: (P, D). No copy is made if the map is in the memory format `channels_last`."""
    return map_NDHW.permute(0, 2, 3, 1).reshape(-1, map_NDHW.shape[1])
