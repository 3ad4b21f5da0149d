"""The aggregated similarity score of an image's patches, and whether it grows with their region (FLSL).

Source: docs/methods.md#aggregated-similarity.

Shape legend: D width, h w grid of an image's patches, N = h w.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional


def aggregated_similarity(map_Dhw: Tensor) -> Tensor:
    """Of each patch, the sum of its cosines with all patches of the image, over the largest such sum: (h, w).

    The sum of a unit vector's inner products with N others is that with their sum: no N x N matrix is needed.
    """
    unit_Dhw = functional.normalize(map_Dhw.double(), dim=0)
    score_hw = torch.einsum("dhw,d->hw", unit_Dhw, unit_Dhw.sum(dim=(1, 2)))
    return (score_hw / score_hw.max().clamp(min=1e-12)).float()


def area_correlation(score_hw: NDArray[np.float32], labels_hw: NDArray[np.int64]) -> float | None:
    """Spearman's correlation of patches' scores with the area of their region in the image, from -1 to 1.

    Args:
        score_hw: what `aggregated_similarity` gave.
        labels_hw: class of each patch; negative ones do not count.

    Returns: None where all patches that count are of regions of one size, or have one score.
    """
    from scipy.stats import spearmanr

    counted = labels_hw >= 0
    labels = labels_hw[counted]
    areas = np.bincount(labels, minlength=1)[labels] if len(labels) else labels
    scores = score_hw[counted]
    if len(np.unique(areas)) < 2 or len(np.unique(scores)) < 2:
        return None
    return float(spearmanr(scores, areas).statistic)
