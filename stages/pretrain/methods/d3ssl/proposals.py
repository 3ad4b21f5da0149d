"""D3SSL's augmentations of regions: cut-outs, masks, jitters and shifts of the proposals of one image, as rectangles.

Source: docs/methods.md#d3ssl-region-augmentations.

These are pure functions of boxes and of numbers drawn uniformly from [0, 1). They touch no pixels.

Boxes are x0, y0, x1, y1; the last row and column are excluded. Whole boxes have integer coordinates and lie inside the
view. An empty rectangle is all zeros.

Shape legend: K proposals, S side of the view in pixels.
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

FloatBoxes: TypeAlias = NDArray[np.float64]
WholeBoxes: TypeAlias = NDArray[np.int64]
Numbers: TypeAlias = NDArray[np.float64]
JitterKind: TypeAlias = Literal["restricted", "contained", "plain", "none"]

# SoCo's cut-out, of the paper's Table 5: the probability that a box is cut, and the fraction of its area.
RANDOM_CUT_P = 0.5
RANDOM_CUT_RATIO = (0.1, 0.3)


def whole_boxes(boxes_K4: FloatBoxes, size: int) -> WholeBoxes:
    """Boxes of a view rounded to whole pixels, at least one pixel wide and high."""
    low_K2 = np.rint(boxes_K4[:, :2]).clip(0, size - 1)
    high_K2 = np.rint(boxes_K4[:, 2:]).clip(low_K2 + 1, size)
    return np.concatenate([low_K2, high_K2], 1).astype(np.int64)


def between(numbers: Any, limits: tuple[float, float]) -> Any:
    """Numbers from [0, 1), scaled and shifted to [limits[0], limits[1])."""
    return limits[0] + (limits[1] - limits[0]) * numbers


# ------------------------------------------------------------------------------------------------------- cut-outs
def proposal_cutout(boxes_K4: WholeBoxes, draws_K3: Numbers, size: int, threshold: float | None = None) -> WholeBoxes:
    """PRC, the proposal-based random cutout: cuts a rectangle from every box, large boxes first.

    A rectangle has the shape of its box. What larger boxes have already cut from a box counts; if it is too much, the
    box is restored before its own cut.

    Args:
        boxes_K4: the proposals in the view.
        draws_K3: for each box, the fraction of its area to cut, and u and v in [0, 1), which place the rectangle.
        size: side of the view in pixels.
        threshold: a box is restored if more than this fraction of it is already cut; None: its own fraction.

    Returns:
        (2K, 4) operations in the order in which they are applied, two for each box: restore this rectangle, then cut
        this one.
    """
    kept_SS = np.ones((size, size), bool)
    operations = np.zeros((2 * len(boxes_K4), 4), np.int64)
    areas_K = (boxes_K4[:, 2] - boxes_K4[:, 0]) * (boxes_K4[:, 3] - boxes_K4[:, 1])
    for n, k in enumerate(np.argsort(-areas_K, kind="stable").tolist()):
        (x0, y0, x1, y1), (ratio, u, v) = boxes_K4[k].tolist(), draws_K3[k].tolist()
        mine = kept_SS[y0:y1, x0:x1]
        covered = 1 - float(mine.mean())
        if covered > (ratio if threshold is None else threshold):
            mine[:] = True
            operations[2 * n] = x0, y0, x1, y1
            covered = 0.0
        side = math.sqrt(max(ratio - covered, 0.0))
        w, h = round((x1 - x0) * side), round((y1 - y0) * side)
        if min(w, h) < 1:
            continue
        x, y = x0 + int(u * (x1 - x0 - w + 1)), y0 + int(v * (y1 - y0 - h + 1))
        kept_SS[y : y + h, x : x + w] = False
        operations[2 * n + 1] = x, y, x + w, y + h
    return operations


def random_cutout(boxes_K4: WholeBoxes, draws_K4: Numbers, size: int) -> WholeBoxes:
    """SoCo's cut-out, for the ablation: cuts a square anywhere in a box, and restores nothing.

    Args:
        boxes_K4: the proposals in the view.
        draws_K4: in [0, 1), for: whether to cut, the fraction of the box's area, x and y of the square's centre.
        size: side of the view in pixels.

    Returns:
        (2K, 4) operations, as from `proposal_cutout`.
    """
    wh_K2 = boxes_K4[:, 2:] - boxes_K4[:, :2]
    half_K1 = np.sqrt(wh_K2.prod(1) * between(draws_K4[:, 1], RANDOM_CUT_RATIO))[:, None] / 2
    centre_K2 = boxes_K4[:, :2] + draws_K4[:, 2:] * wh_K2
    operations = np.zeros((2 * len(boxes_K4), 4), np.int64)
    squares_K4 = np.concatenate([centre_K2 - half_K1, centre_K2 + half_K1], 1)
    operations[1::2] = np.rint(squares_K4).clip(0, size) * (draws_K4[:, :1] < RANDOM_CUT_P)
    return operations


# --------------------------------------------------------------------------------------------- masks, jitter, shift
def context_rectangles(
    boxes_K4: WholeBoxes, draws_K3: Numbers, size: int, scale: tuple[float, float], aspect: tuple[float, float]
) -> WholeBoxes:
    """PRM, the proposal-based random mask: a rectangle on the edge of each box.

    The rectangle is centred where a ray from the middle of the box leaves the box.

    Args:
        boxes_K4: the proposals in the view.
        draws_K3: in [0, 1), for: the area, the logarithm of the aspect, the angle of the ray.
        size: side of the view in pixels; rectangles are clipped to it.
        scale: limits of the area, as a multiple of the box's.
        aspect: limits of width / height.

    Returns:
        (K, 4).
    """
    wh_K2 = (boxes_K4[:, 2:] - boxes_K4[:, :2]).astype(np.float64)
    area_K = wh_K2.prod(1) * between(draws_K3[:, 0], scale)
    ratio_K = np.exp(between(draws_K3[:, 1], (math.log(aspect[0]), math.log(aspect[1]))))
    half_K2 = np.sqrt(np.stack([area_K * ratio_K, area_K / ratio_K], 1)) / 2
    angle_K = 2 * math.pi * draws_K3[:, 2]
    ray_K2 = np.stack([np.cos(angle_K), np.sin(angle_K)], 1)
    reach_K1 = (wh_K2 / 2 / np.abs(ray_K2).clip(1e-9)).min(1, keepdims=True)
    edge_K2 = (boxes_K4[:, :2] + boxes_K4[:, 2:]) / 2 + reach_K1 * ray_K2
    corners_K4 = np.concatenate([edge_K2 - half_K2, edge_K2 + half_K2], 1)
    return np.rint(corners_K4).clip(0, size).astype(np.int64)


def jittered(boxes_K4: FloatBoxes, draws_K4: Numbers, size: int, ratio: float, how: JitterKind) -> FloatBoxes:
    """RBJ, the restricted box jitter: scales and shifts boxes, and clips them to the view.

    Args:
        boxes_K4: the proposals in the view.
        draws_K4: in [0, 1), for: width, height, the shifts along x and y.
        size: side of the view in pixels.
        ratio: the largest change, as a fraction of a box's sides.
        how: "restricted": sides shrink by up to `ratio`, the centre moves by up to `ratio` of them. "contained": the
            same, but never out of the box. "plain" (SoCo's): the sides shrink or grow and the corner moves by up to
            `ratio`. "none": the boxes as they are.

    Returns:
        (K, 4), for RoIAlign.
    """
    if how == "none":
        return boxes_K4
    wh_K2, signed_K4 = boxes_K4[:, 2:] - boxes_K4[:, :2], 2 * draws_K4 - 1
    if how == "plain":
        low_K2, new_K2 = boxes_K4[:, :2] + signed_K4[:, 2:] * ratio * wh_K2, wh_K2 * (1 + ratio * signed_K4[:, :2])
    else:
        new_K2 = wh_K2 * (1 - ratio * draws_K4[:, :2])
        room_K2 = ratio * wh_K2 if how == "restricted" else np.minimum(ratio * wh_K2, (wh_K2 - new_K2) / 2)
        low_K2 = boxes_K4[:, :2] + (wh_K2 - new_K2) / 2 + signed_K4[:, 2:] * room_K2
    return np.concatenate([low_K2, low_K2 + new_K2], 1).clip(0, size)


def common_shift(boxes_K4: WholeBoxes, draws_2: Numbers, size: int) -> WholeBoxes:
    """One offset (dx, dy) for all boxes, uniform over the offsets that keep every box inside the view: (2,)."""
    low_2, high_2 = -boxes_K4[:, :2].min(0), size - boxes_K4[:, 2:].max(0)
    return low_2 + np.floor(draws_2 * (high_2 - low_2 + 1)).astype(np.int64)
