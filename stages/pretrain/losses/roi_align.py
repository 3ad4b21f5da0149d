"""RoIAlign as two small matrix products: with gradients, in any float type, for any number of channels.

Source: docs/methods.md#roialign.

Bilinear sampling on a grid of points is separable: one matrix pools rows, another pools columns. The values equal those
of torchvision's operator. On a CPU and with hundreds of channels (soft assignments) this form is faster.

Shape legend: R regions (B maps, K of each), D channels, H W size of the map, S side of the output.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def roi_align(
    maps_RDHW: Tensor, boxes_R4: Tensor, *, size: int = 7, sampling_ratio: int = 0, aligned: bool = True
) -> Tensor:
    """Resamples one box of each map to size x size cells.

    Args:
        maps_RDHW: one map for each region (`roi_align_regions` takes several regions of one map).
        boxes_R4: x0, y0, x1, y1 in cells of the map; cell i covers [i, i+1).
        size: cells a side of the output.
        sampling_ratio: sample points along each axis of an output cell. 0: as many as the output cell spans map cells,
            rounded up (torchvision's adaptive mode). Boxes must then lie inside the map, up to rounding, because at
            most ceil(map side / size) points are taken.
        aligned: True: half-pixel correct, as everywhere in Tessera. False: torchvision's older convention.

    Returns:
        (R, D, size, size).
    """
    height, width = maps_RDHW.shape[2:]
    boxes_R4 = boxes_R4.to(torch.promote_types(maps_RDHW.dtype, torch.float32))
    rows_RSH = _pooling_matrix(boxes_R4[:, 1], boxes_R4[:, 3], height, size, sampling_ratio, aligned)
    columns_RSW = _pooling_matrix(boxes_R4[:, 0], boxes_R4[:, 2], width, size, sampling_ratio, aligned)
    rows_RSH, columns_RSW = rows_RSH.to(maps_RDHW.dtype), columns_RSW.to(maps_RDHW.dtype)
    return rows_RSH[:, None] @ (maps_RDHW @ columns_RSW.transpose(1, 2)[:, None])


def roi_align_regions(maps_BDHW: Tensor, boxes_BK4: Tensor, *, size: int = 7) -> Tensor:
    """Resamples K boxes of each map to size x size cells.

    The values are those of `roi_align` on every map repeated K times, without making these copies.

    Args:
        maps_BDHW: the feature maps.
        boxes_BK4: x0, y0, x1, y1 in cells of the map; cell i covers [i, i+1).
        size: cells a side of the output.

    Returns:
        (B*K, D, size, size); region k of map b is row b*K + k.
    """
    (batch, channels, height, width), count = maps_BDHW.shape, boxes_BK4.shape[1]
    boxes_R4 = boxes_BK4.flatten(0, 1).to(torch.promote_types(maps_BDHW.dtype, torch.float32))
    rows_RSH = _pooling_matrix(boxes_R4[:, 1], boxes_R4[:, 3], height, size, 0, True).to(maps_BDHW.dtype)
    columns_RSW = _pooling_matrix(boxes_R4[:, 0], boxes_R4[:, 2], width, size, 0, True).to(maps_BDHW.dtype)
    # The rows of all K boxes of a map in one product, then the columns of each region.
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
    # Points in each bin: a fixed number, or ceil(bin); points beyond that get weight 0.
    count_R = torch.full_like(bin_R, samples) if sampling_ratio else bin_R.ceil().clamp(0, samples)
    offset = torch.arange(samples, device=bin_R.device, dtype=bin_R.dtype)
    inside_bin_RT = (offset + 0.5) / count_R.clamp(min=1)[:, None]
    bins = torch.arange(size, device=bin_R.device, dtype=bin_R.dtype)
    points_RST = low_R[:, None, None] + (bins[None, :, None] + inside_bin_RT[:, None]) * bin_R[:, None, None]
    used_RST = (offset < count_R[:, None])[:, None] & (points_RST >= -1) & (points_RST <= side)
    # Bilinear weights: a hat function around the point. Points beyond the outermost centres take the border's value.
    clamped_RST = points_RST.clamp(0, side - 1)
    cells = torch.arange(side, device=bin_R.device, dtype=bin_R.dtype)
    hats_RSTC = (1 - (clamped_RST[..., None] - cells).abs()).clamp(min=0) * used_RST[..., None]
    return hats_RSTC.sum(dim=2) / count_R.clamp(min=1)[:, None, None]
