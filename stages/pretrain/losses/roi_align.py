"""RoIAlign as two small matrix products, so that gradients, any number of channels and float64 come for free.

Bilinear sampling on a grid of points is separable: one matrix pools rows, one pools columns. Values equal
torchvision's operator (docs/methods.md#roialign); with hundreds of channels (soft assignments) it is faster on a CPU.

Shape legend: R regions (B maps, K of each), D channels, H W size of the map, S side of the output.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def roi_align(
    maps_RDHW: Tensor, boxes_R4: Tensor, *, size: int = 7, sampling_ratio: int = 0, aligned: bool = True
) -> Tensor:
    """One box of each map, resampled to (R, D, size, size).

    Args:
        maps_RDHW: one map a region (`roi_align_regions` takes several of a map).
        boxes_R4: x0, y0, x1, y1 in map units, cell i covers [i, i+1).
        sampling_ratio: sample points a bin and axis; 0: ceil(bin size), as torchvision's adaptive mode.
        aligned: half-pixel correct (the default everywhere in Tessera); False is torchvision's old convention.

    In adaptive mode boxes are taken to lie inside the map, up to rounding: at most ceil(side / size) samples.
    """
    height, width = maps_RDHW.shape[2:]
    boxes_R4 = boxes_R4.to(torch.promote_types(maps_RDHW.dtype, torch.float32))
    rows_RSH = _pooling_matrix(boxes_R4[:, 1], boxes_R4[:, 3], height, size, sampling_ratio, aligned)
    columns_RSW = _pooling_matrix(boxes_R4[:, 0], boxes_R4[:, 2], width, size, sampling_ratio, aligned)
    rows_RSH, columns_RSW = rows_RSH.to(maps_RDHW.dtype), columns_RSW.to(maps_RDHW.dtype)
    return rows_RSH[:, None] @ (maps_RDHW @ columns_RSW.transpose(1, 2)[:, None])


def roi_align_regions(maps_BDHW: Tensor, boxes_BK4: Tensor, *, size: int = 7) -> Tensor:
    """K boxes of each map, resampled to (B*K, D, size, size), region k of map b at row b*K + k.

    The same values as `roi_align` of every map repeated K times, without making those copies.
    """
    (batch, channels, height, width), count = maps_BDHW.shape, boxes_BK4.shape[1]
    boxes_R4 = boxes_BK4.flatten(0, 1).to(torch.promote_types(maps_BDHW.dtype, torch.float32))
    rows_RSH = _pooling_matrix(boxes_R4[:, 1], boxes_R4[:, 3], height, size, 0, True).to(maps_BDHW.dtype)
    columns_RSW = _pooling_matrix(boxes_R4[:, 0], boxes_R4[:, 2], width, size, 0, True).to(maps_BDHW.dtype)
    # Rows of all K boxes of a map in one product, then the columns of each region.
    lines_BHX = maps_BDHW.transpose(1, 2).reshape(batch, height, channels * width)
    pooled_RXW = (rows_RSH.reshape(batch, count * size, height) @ lines_BHX).reshape(batch * count, -1, width)
    regions_RSDS = (pooled_RXW @ columns_RSW.transpose(1, 2)).reshape(batch * count, size, channels, size)
    return regions_RSDS.transpose(1, 2)


def _pooling_matrix(low_R: Tensor, high_R: Tensor, side: int, size: int, sampling_ratio: int, aligned: bool) -> Tensor:
    """(R, size, side): the weight of every map row (or column) in every output row (or column)."""
    low_R, extent_R = low_R - 0.5 * aligned, high_R - low_R
    if not aligned:
        extent_R = extent_R.clamp(min=1.0)
    bin_R = extent_R / size
    samples = sampling_ratio or max(1, math.ceil(side / size))
    # Points per bin: fixed, or ceil(bin) of them, the rest switched off.
    count_R = torch.full_like(bin_R, samples) if sampling_ratio else bin_R.ceil().clamp(0, samples)
    offset = torch.arange(samples, device=bin_R.device, dtype=bin_R.dtype)
    inside_bin_RT = (offset + 0.5) / count_R.clamp(min=1)[:, None]
    bins = torch.arange(size, device=bin_R.device, dtype=bin_R.dtype)
    points_RST = low_R[:, None, None] + (bins[None, :, None] + inside_bin_RT[:, None]) * bin_R[:, None, None]
    used_RST = (offset < count_R[:, None])[:, None] & (points_RST >= -1) & (points_RST <= side)
    # Bilinear weights: a hat function around the point; points outside the outermost centres take the border's value.
    clamped_RST = points_RST.clamp(0, side - 1)
    cells = torch.arange(side, device=bin_R.device, dtype=bin_R.dtype)
    hats_RSTC = (1 - (clamped_RST[..., None] - cells).abs()).clamp(min=0) * used_RST[..., None]
    return hats_RSTC.sum(dim=2) / count_R.clamp(min=1)[:, None, None]
