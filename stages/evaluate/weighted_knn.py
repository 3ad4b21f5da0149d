"""Weighted k-NN vote on frozen features (DINO's protocol). Pure functions of tensors.

Source: docs/methods.md#weighted-k-nn.

Shape legend: N train images, M test images, D width, C classes, K neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 32_000_000  # similarities in memory at once


def nearest(train_ND: Tensor, test_MD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosine similarities (M, K) and train rows (M, K) of the k nearest, nearest first; ties in the order of the rows.

    Both inputs must be L2-normalised.

    Raises: ValueError if there are fewer than k train rows.
    """
    if k > len(train_ND):
        raise ValueError(f"k is {k}, but there are {len(train_ND)} features to choose from")
    step = max(1, _BLOCK // len(train_ND))
    found = []
    for start in range(0, len(test_MD), step):
        similarity = test_MD[start : start + step] @ train_ND.T
        value, row = similarity.topk(k, dim=1)
        # topk leaves equal values in any order: sort by row first, then stably by value.
        row, order = row.sort(dim=1)
        value, order = value.gather(1, order).sort(dim=1, descending=True, stable=True)
        found.append((value, row.gather(1, order)))
    return torch.cat([value for value, _ in found]), torch.cat([row for _, row in found])


def votes(similarity_MK: Tensor, labels_MK: Tensor, classes: int, temperature: float = 0.07) -> Tensor:
    """The sum of votes for each class, (M, C): a neighbour votes exp(similarity / temperature) for its label.

    Args:
        similarity_MK: what `nearest` gave.
        labels_MK: class indices of these neighbours.
        classes: C.
        temperature: smaller ones give nearer neighbours more weight.
    """
    weight = (similarity_MK / temperature).exp()
    return weight.new_zeros(len(weight), classes).scatter_add_(1, labels_MK, weight)


def ranks(votes_MC: Tensor, labels_M: Tensor) -> Tensor:
    """The place of the true class among the votes, (M,), 0 = first; of equal votes, the lower class index is first."""
    order = votes_MC.argsort(dim=1, descending=True, stable=True)
    return (order == labels_M[:, None]).int().argmax(dim=1)


def accuracy(ranks_M: Tensor, top: int) -> float:
    """Per cent of the images whose class is among the first `top`, by their ranks."""
    return float((ranks_M < top).double().mean() * 100)
