"""Region-level draws of one image (D3SSL,
docs/methods.md#d3ssl-region-augmentations): cut-outs, masks, jitters and shifts of its
proposals, as rectangles. Pure functions of boxes and of numbers drawn uniformly from [0, 1); no pixel is touched.

Legend: K proposals, S side of the view in pixels. Boxes are x0, y0, x1, y1, the last row and column excluded.
Whole boxes have integer coordinates and lie inside the view; an empty rectangle is all zeros.
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

# SoCo's cut-out, which the paper's Table 5 compares with: how often a box is cut, and how much of its area.
RANDOM_CUT_P = 0.5
RANDOM_CUT_RATIO = (0.1, 0.3)


def whole_boxes(boxes_K4: FloatBoxes, size: int) -> WholeBoxes:
    """Boxes of a view rounded to whole pixels; each keeps at least one."""
    low_K2 = np.rint(boxes_K4[:, :2]).clip(0, size - 1)
    high_K2 = np.rint(boxes_K4[:, 2:]).clip(low_K2 + 1, size)
    return np.concatenate([low_K2, high_K2], 1).astype(np.int64)


def between(numbers: Any, limits: tuple[float, float]) -> Any:
    """Uniform numbers of [0, 1) moved to [limits[0], limits[1])."""
    return limits[0] + (limits[1] - limits[0]) * numbers


# ------------------------------------------------------------------------------------------------------- cut-outs
def proposal_cutout(boxes_K4: WholeBoxes, draws_K3: Numbers, size: int, threshold: float | None = None) -> WholeBoxes:
    """PRC: cuts a rectangle of its own shape from every box, large boxes first, sparing smaller ones.

    Args:
        draws_K3: for each box the fraction of its area to cut, and u, v in [0, 1) that place the rectangle.
        threshold: a box of which larger ones have cut more than this is restored first; None: its own fraction.

    Returns: (2K, 4) operations in the order of their application, two a box: restore this rectangle, cut this one.
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
    """The ablation's plain cut-out, SoCo's: squares anywhere in the boxes, nothing restored; operations as above.

    Args:
        draws_K4: whether to cut, what fraction of the box's area, and where the square's centre lies in the box.
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
    """PRM: for each box a rectangle of `scale` times its area, centred where a ray from its middle leaves it.

    Args:
        draws_K3: of the area, of the log aspect (width / height), and of the ray's angle.
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
    """RBJ: boxes for RoIAlign, clipped to the view.

    Args:
        draws_K4: of width, height and the shifts along x and y.
        how: restricted: sides shrink to at least 1 - ratio, the centre moves by up to ratio of them; contained: the
            same, never out of the box; plain: SoCo's, corner and sides by up to ratio either way; none.
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
    """(2,) the offset dx, dy of all boxes together, uniform over those that keep every one of them inside."""
    low_2, high_2 = -boxes_K4[:, :2].min(0), size - boxes_K4[:, 2:].max(0)
    return low_2 + np.floor(draws_2 * (high_2 - low_2 + 1)).astype(np.int64)
