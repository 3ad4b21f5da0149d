"""How well a video's object masks were propagated: region similarity J and contour accuracy F of DAVIS.

Source: docs/methods.md#video-object-segmentation.

Shape legend: T frames, H W sides of a frame in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]  # (H, W) of one object
TOLERANCE = 0.008  # of the frame's diagonal: how far a contour may be off


@dataclass(frozen=True)
class ObjectScores:
    """One object in the frames that count, in [0, 1]."""

    j: NDArray[np.float64]  # (T - 2,)
    f: NDArray[np.float64]  # (T - 2,)


def score_object(truth_THW: NDArray[np.bool_], found_THW: NDArray[np.bool_]) -> ObjectScores:
    """J and F of every frame but the first, which is given, and the last, which DAVIS leaves out.

    Args:
        truth_THW: the object's true masks.
        found_THW: its masks as they were propagated.

    Raises:
        ValueError: fewer than three frames.
    """
    if len(truth_THW) < 3:
        raise ValueError(f"a video of {len(truth_THW)} frames has none between its first and its last")
    pairs = list(zip(truth_THW[1:-1], found_THW[1:-1], strict=True))
    return ObjectScores(
        np.array([region_similarity(truth, found) for truth, found in pairs]),
        np.array([contour_accuracy(truth, found) for truth, found in pairs]),
    )


def region_similarity(truth_HW: Mask, found_HW: Mask) -> float:
    """J: intersection over union; 1 where both are empty."""
    union = int((truth_HW | found_HW).sum())
    return int((truth_HW & found_HW).sum()) / union if union else 1.0


def contour_accuracy(truth_HW: Mask, found_HW: Mask, tolerance: float = TOLERANCE) -> float:
    """F: harmonic mean of the two shares of contour pixels that lie near the other mask's contour; both empty: 1.

    Args:
        truth_HW: the true mask.
        found_HW: the mask to score.
        tolerance: how near, as a fraction of the diagonal; rounded up to whole pixels.
    """
    true, found = contour(truth_HW), contour(found_HW)
    if not true.any() or not found.any():
        return float(not true.any() and not found.any())
    radius = math.ceil(tolerance * math.hypot(*truth_HW.shape))
    precision = (found & widened(true, radius)).sum() / found.sum()
    recall = (true & widened(found, radius)).sum() / true.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def contour(mask_HW: Mask) -> Mask:
    """The pixels whose right, lower or lower right neighbour is on the other side of the mask's edge."""
    padded = np.pad(mask_HW, ((0, 1), (0, 1)), mode="edge")  # beyond the frame nothing changes
    right, below, diagonal = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask_HW != right) | (mask_HW != below) | (mask_HW != diagonal)


def widened(mask_HW: Mask, radius: int) -> Mask:
    """All pixels at most `radius` pixels from one of the mask's."""
    reach = np.arange(-radius, radius + 1)
    disk = (reach[:, None] ** 2 + reach**2 <= radius**2).astype(np.uint8)
    border = {"borderType": cv2.BORDER_CONSTANT, "borderValue": 0}
    return cv2.dilate(mask_HW.astype(np.uint8), disk, **border).astype(bool)
