"""Scores of a segmentation from its confusion matrix.

Source: docs/methods.md#segmentation-scores.

Shape legend: C classes; H[t, p] counts pixels of true class t that were predicted as p.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.int64]  # (C, C)


def confusion(truth: NDArray[Any], prediction: NDArray[Any], classes: int) -> Matrix:
    """The confusion matrix over all pixels, (C, C); those with a negative truth are ignored."""
    counts = truth >= 0
    index = truth[counts].astype(np.int64) * classes + prediction[counts]
    return np.bincount(index, minlength=classes * classes).reshape(classes, classes)


@dataclass(frozen=True)
class Scores:
    """All in per cent; NaN where a class occurs in neither truth nor prediction."""

    iou: NDArray[np.float64]  # (C,)
    accuracy: NDArray[np.float64]  # (C,)
    miou: float
    pixel_accuracy: float
    mean_accuracy: float

    def metrics(self, suffix: str = "") -> dict[str, float]:
        """The three means; `suffix` (of an encoder) is added to their names."""
        return {
            f"miou{suffix}": self.miou,
            f"pixel_accuracy{suffix}": self.pixel_accuracy,
            f"mean_accuracy{suffix}": self.mean_accuracy,
        }


def scores(matrix: Matrix, absent: Literal["skip", "zero"] = "skip") -> Scores:
    """IoU and accuracies. A class absent from truth and prediction is skipped (mmseg, STEGO) or counts 0 (Leopart).

    Raises: ValueError if no pixel was counted.
    """
    if not matrix.sum():
        raise ValueError("no pixel has a class: everything is void")
    hit = np.diag(matrix).astype(np.float64)
    true, predicted = matrix.sum(axis=1), matrix.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        iou_C = 100 * hit / (true + predicted - hit)
        accuracy_C = 100 * hit / true
    counted = np.nan_to_num(iou_C, nan=0.0) if absent == "zero" else iou_C[~np.isnan(iou_C)]
    return Scores(
        iou_C,
        accuracy_C,
        float(counted.mean()),
        float(100 * hit.sum() / matrix.sum()),
        float(accuracy_C[true > 0].mean()),
    )
