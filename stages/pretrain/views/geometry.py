"""Where a view lies in its image, and where two views of one image show the same thing. Pure functions.

Most functions take numpy arrays (drawing, one image) or torch tensors (losses, whole batches) with any leading axes,
and return the same type. Coordinates are continuous: pixel i covers [i, i+1).

Legend: an affine (..., 2, 3) maps view pixels to stored-image pixels. Views are axis-aligned and may be mirrored left
to right: an affine is [[sx, 0, tx], [0, sy, ty]], with sx < 0 in a mirrored view. Boxes (..., 4) are x0, y0, x1, y1.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Array = TypeVar("Array", np.ndarray[Any, Any], Tensor)


def _lib(array: Any) -> Any:
    return torch if isinstance(array, Tensor) else np


# ------------------------------------------------------------------------------------------------------ one affine
def crop_affine(box: Array, size: int, flip: bool = False) -> Array:
    """The affine (..., 2, 3) of a view of `size` x `size` pixels that shows `box` (..., 4) of the image.

    `flip` mirrors left to right: the view's left edge is then the box's right edge.
    """
    lib = _lib(box)
    x0, y0, x1, y1 = (box[..., i] for i in range(4))
    sx, sy, zero = (x1 - x0) / size, (y1 - y0) / size, x0 * 0
    row_x = lib.stack([-sx, zero, x1] if flip else [sx, zero, x0], -1)
    return lib.stack([row_x, lib.stack([zero, sy, y0], -1)], -2)


def apply(affine: Array, points: Array) -> Array:
    """Points (..., n, 2), as x and y, mapped by an affine (..., 2, 3)."""
    lib = _lib(affine)
    return points @ lib.swapaxes(affine[..., :2], -1, -2) + affine[..., None, :, 2]


def compose(outer: Array, inner: Array) -> Array:
    """The affine that does `inner` first, then `outer`.

    With `inner` from a crop's pixels to a view's and `outer` from that view's to the image's, it is the crop's affine.
    """
    lib = _lib(outer)
    linear = outer[..., :2] @ inner[..., :2]
    shift = outer[..., :2] @ inner[..., 2:] + outer[..., 2:]
    return lib.concatenate([linear, shift], -1)


def invert(affine: Array) -> Array:
    """The affine (..., 2, 3) from image pixels to view pixels."""
    lib = _lib(affine)
    linear = lib.linalg.inv(affine[..., :2])
    return lib.concatenate([linear, -linear @ affine[..., 2:]], -1)


def flipped(affine: Array) -> Array:
    """(...,) bool: which views are mirrored left to right."""
    return affine[..., 0, 0] < 0


def rectangle(affine: Array, size: int) -> Array:
    """The box (..., 4) of the image that a view of `size` pixels shows."""
    lib = _lib(affine)
    tx, ty = affine[..., 0, 2], affine[..., 1, 2]
    ex, ey = tx + affine[..., 0, 0] * size, ty + affine[..., 1, 1] * size
    return lib.stack([lib.minimum(tx, ex), lib.minimum(ty, ey), lib.maximum(tx, ex), lib.maximum(ty, ey)], -1)


# ----------------------------------------------------------------------------------------------------------- boxes
def intersect(a: Array, b: Array) -> tuple[Array, Array]:
    """The common box (..., 4) of two, and whether it has an area (..., bool; false for boxes that only touch)."""
    lib = _lib(a)
    low, high = lib.maximum(a[..., :2], b[..., :2]), lib.minimum(a[..., 2:], b[..., 2:])
    return lib.concatenate([low, lib.maximum(low, high)], -1), (high > low).all(-1)


def area(box: Array) -> Array:
    """Areas (...) of boxes in square pixels; 0 for an empty box."""
    sides = (box[..., 2:] - box[..., :2]).clip(0, None)
    return sides[..., 0] * sides[..., 1]


def to_image(box: Array, affine: Array) -> Array:
    """Boxes of a view, in that view's pixels, as boxes of the image. `affine` broadcasts over the boxes."""
    lib = _lib(box)
    scale, shift = _diagonal(affine), affine[..., 2]
    a, b = box[..., :2] * scale + shift, box[..., 2:] * scale + shift
    return lib.concatenate([lib.minimum(a, b), lib.maximum(a, b)], -1)


def to_view(box: Array, affine: Array) -> Array:
    """Boxes of the image in a view's pixels, not clipped; mirrored where the view is."""
    lib = _lib(box)
    scale, shift = _diagonal(affine), affine[..., 2]
    a, b = (box[..., :2] - shift) / scale, (box[..., 2:] - shift) / scale
    return lib.concatenate([lib.minimum(a, b), lib.maximum(a, b)], -1)


def clip_to_view(box: Array, affine: Array, size: int, min_side: float = 1.0) -> tuple[Array, Array]:
    """Boxes of the image, cut at the view's edge, in the view's pixels.

    Args:
        box: (..., 4) in image pixels.
        affine: (..., 2, 3), broadcast over the boxes: with K boxes an image give it an axis (`affine[:, None]`).
        size: side of the view in pixels.
        min_side: a box of which fewer view pixels are left on a side is not valid.

    Returns:
        Boxes (..., 4) with 0 <= x0 <= x1 <= size, and whether each is valid (..., bool).
    """
    inside = to_view(box, affine).clip(0, size)
    return inside, ((inside[..., 2:] - inside[..., :2]) >= min_side).all(-1)


def _diagonal(affine: Array) -> Array:
    return _lib(affine).stack([affine[..., 0, 0], affine[..., 1, 1]], -1)


# --------------------------------------------------------------------------------------------- two views of an image
def overlap(affine_a: Array, affine_b: Array, size_a: int, size_b: int) -> tuple[Array, Array, Array]:
    """The rectangle that two views share, in the pixels of each (docs/methods.md#views-and-overlap).

    Args:
        affine_a: (..., 2, 3); the two broadcast against each other: (G, 1, B, 2, 3) with (1, V, B, 2, 3) gives all
            pairs of G and V views, as Leopart's tables of boxes hold them.
        affine_b: likewise.
        size_a: side of view a in pixels.
        size_b: side of view b in pixels.

    Returns:
        Boxes (..., 4) in a's pixels, boxes (..., 4) in b's pixels, and whether there is an overlap (..., bool). The
        boxes of a pair without one are empty (x0 == x1 or y0 == y1) and inside both views.

    RoIAlign reads a box from left to right: in a mirrored view what it gives is mirrored (`unmirror` turns it back).
    """
    common, valid = intersect(rectangle(affine_a, size_a), rectangle(affine_b, size_b))
    # Clipping removes rounding errors: a box that ends at 224.00002 pixels is not inside its view.
    return to_view(common, affine_a).clip(0, size_a), to_view(common, affine_b).clip(0, size_b), valid


def feature_boxes(box: Array, stride: float) -> Array:
    """Boxes in view pixels as boxes in cells of a feature map, which RoIAlign(aligned=True) takes.

    See docs/methods.md#roialign; `stride` is view pixels a cell.
    """
    return box / stride


def roi_rows(boxes_BK4: Tensor) -> Tensor:
    """Boxes (B, 4) or (B, K, 4) as RoIAlign's rows (B*K, 5): the image's index in the batch, then the box."""
    boxes_BK4 = boxes_BK4[:, None] if boxes_BK4.dim() == 2 else boxes_BK4
    images, count = boxes_BK4.shape[:2]
    index = torch.arange(images, device=boxes_BK4.device, dtype=boxes_BK4.dtype).repeat_interleave(count)
    return torch.cat([index[:, None], boxes_BK4.reshape(-1, 4)], 1)


def unmirror(maps_BDhw: Tensor, mirrored_B: Tensor) -> Tensor:
    """Turns the maps of mirrored views back, so that left is left in the image. Differentiable.

    Args:
        maps_BDhw: (B, D, h, w) feature maps or RoIAlign's regions.
        mirrored_B: (B,) bool, `flipped(affine)`.
    """
    return torch.where(mirrored_B[:, None, None, None], maps_BDhw.flip(-1), maps_BDhw)


def correspondence(
    affine_a: Tensor, affine_b: Tensor, size_a: int, size_b: int, steps: int | tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """For the centre of every cell of a grid over view a, the place in view b that shows the same image point.

    Args:
        affine_a: (..., 2, 3).
        affine_b: likewise, with the same leading axes.
        size_a: side of view a in pixels.
        size_b: side of view b in pixels.
        steps: rows and columns of the grid, e.g. the feature map's height and width.

    Returns:
        A grid (..., rows, columns, 2) for `grid_sample(align_corners=False)` on any map of view b, with [-1, 1] inside
        the view, and whether each point lies inside it (..., rows, columns, bool).
    """
    rows, columns = (steps, steps) if isinstance(steps, int) else steps
    y = (torch.arange(rows, device=affine_a.device, dtype=affine_a.dtype) + 0.5) * (size_a / rows)
    x = (torch.arange(columns, device=affine_a.device, dtype=affine_a.dtype) + 0.5) * (size_a / columns)
    yy, xx = torch.meshgrid(y, x, indexing="ij")
    centers = torch.stack([xx, yy], -1).reshape(-1, 2)
    points = apply(invert(affine_b), apply(affine_a, centers.expand(*affine_a.shape[:-2], -1, 2)))
    grid = (points / size_b * 2 - 1).reshape(*points.shape[:-2], rows, columns, 2)
    return grid, (grid.abs() <= 1).all(-1)
