"""The nearest train patches of other patches, and their vote.

Source: docs/methods.md#dense-classifiers.

Shape legend: N train patches, M other patches, D width, K neighbours, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from stages.evaluate.patch_labels import Patches
from stages.evaluate.weighted_knn import nearest


class LabelledNeighbors:
    """Train patches, to be asked for the nearest ones of other patches.

    Args:
        train: the patches that vote.
        distance: "cosine" or "l2".
    """

    def __init__(self, train: Patches, distance: str) -> None:
        self.cosine, self.labels_N = distance == "cosine", train.labels
        if self.cosine:
            self.bank_ND = functional.normalize(train.vectors, dim=1)
        else:
            # The b of the smallest |a - b|^2 has the largest inner product of (a, 1) and (b, -|b|^2 / 2).
            self.bank_ND = torch.cat([train.vectors, -train.vectors.square().sum(dim=1, keepdim=True) / 2], dim=1)

    def labels_of(self, vectors_MD: Tensor, k: int) -> Tensor:
        """Classes of the k nearest train patches, nearest first, (M, K). Raises ValueError for fewer than k."""
        if self.cosine:
            asked_MD = functional.normalize(vectors_MD, dim=1)
        else:
            asked_MD = torch.cat([vectors_MD, torch.ones(len(vectors_MD), 1)], dim=1)
        return self.labels_N[nearest(self.bank_ND, asked_MD, k)[1]]


def majority(labels_MK: Tensor, classes: int) -> Tensor:
    """The most frequent class of each row, (M,); of equally frequent ones the first."""
    votes_MC = torch.zeros(len(labels_MK), classes, dtype=torch.int32)
    votes_MC.scatter_add_(1, labels_MK, torch.ones(1, dtype=torch.int32).expand(labels_MK.shape))
    return votes_MC.argmax(dim=1)
