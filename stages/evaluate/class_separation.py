"""How far classes lie apart and how wide they are: DSA's measures of an embedding.

Source: docs/methods.md#class-separation.

Shape legend: B vectors, D width, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor


class Separation(NamedTuple):
    """For trends, not for the paper's values: it prints variances above 1, which unit vectors cannot have."""

    inter_class_distance: Tensor  # scalar: mean Euclidean distance of two class means
    intra_class_variance: Tensor  # scalar: mean over classes of `variances`
    means: Tensor  # (K, D), not renormalised
    variances: Tensor  # (K,), mean squared distance of a class's vectors from its mean


def class_separation(vectors_BD: Tensor, labels_B: Tensor) -> Separation:
    """Measures of l2-normalised vectors by class; classes are the distinct labels, in order.

    Raises: ValueError for fewer than two classes.
    """
    classes_K, member_B, count_K = torch.unique(labels_B, return_inverse=True, return_counts=True)
    if len(classes_K) < 2:
        raise ValueError("class separation compares classes: give vectors of at least two")
    unit_BD = functional.normalize(vectors_BD, dim=1)
    sums_KD = unit_BD.new_zeros(len(classes_K), unit_BD.shape[1]).index_add_(0, member_B, unit_BD)
    means_KD = sums_KD / count_K[:, None]
    squared_B = (unit_BD - means_KD[member_B]).square().sum(dim=1)
    variance_K = unit_BD.new_zeros(len(classes_K)).index_add_(0, member_B, squared_B) / count_K
    return Separation(torch.pdist(means_KD).mean(), variance_K.mean(), means_KD, variance_K)
