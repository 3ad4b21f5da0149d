"""Hummingbird: every patch gets the labels of the memory patches most similar to it, without any training.

Source: docs/methods.md#in-context-segmentation.

Shape legend: M memory patches, N query patches, D width, C classes, K neighbours, P side of a patch, h w grid of
patches, H = h P and W = w P sides of a mask.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

CELL = 16  # pixels on a side in which a patch's labels are counted


def class_shares(labels_HW: Tensor, patch: int, classes: int, *, void_as_background: bool = False) -> Tensor:
    """Of each patch, the share of its pixels that each class has: (h, w, C), rows that sum to 1.

    Args:
        labels_HW: class index of each pixel; negative: void.
        patch: P; H and W are multiples of it.
        classes: C.
        void_as_background: void counts as class 0, as in the public code. Else void pixels are left out, and a patch
            of nothing else has a row of zeros.
    """
    labels_HW = labels_HW.long()
    if void_as_background:
        labels_HW = labels_HW.clamp(min=0)
    height, width = (side // patch for side in labels_HW.shape)
    patches_hwS = labels_HW.reshape(height, patch, width, patch).transpose(1, 2).reshape(height, width, -1)
    counts_hwC = torch.zeros(height, width, classes + 1)
    counts_hwC.scatter_add_(2, patches_hwS + 1, torch.ones(1).expand(patches_hwS.shape))
    counts_hwC = counts_hwC[..., 1:]
    return counts_hwC / counts_hwC.sum(dim=2, keepdim=True).clamp(min=1)


def cell_labels(labels_HW: NDArray[np.int16], height: int, width: int) -> Tensor:
    """A mask at `CELL` pixels a patch, for a grid of height x width patches; negative stays void."""
    size = (width * CELL, height * CELL)
    return torch.from_numpy(cv2.resize(np.ascontiguousarray(labels_HW), size, interpolation=cv2.INTER_NEAREST_EXACT))


def rare_first(shares_NC: Tensor, draws_N: NDArray[np.float64], quota: int) -> Tensor:
    """Which patches of an image enter a memory that has not room for all: rows, (min(quota, N'),).

    A patch scores the sum, over its classes, of how many patches of the image hold that class, times a uniform draw;
    those of the smallest scores are taken, so that rare classes are kept. Patches of void only never are.

    Args:
        shares_NC: what `class_shares` gave, one row a patch.
        draws_N: uniform in [0, 1).
        quota: how many to take.
    """
    holds_NC = shares_NC > 0
    score_N = (holds_NC * holds_NC.sum(dim=0)).sum(dim=1).double() * torch.from_numpy(draws_N)
    score_N[~holds_NC.any(dim=1)] = torch.inf
    rows = score_N.argsort(stable=True)[:quota]
    return rows[score_N[rows].isfinite()]


def recall_shares(similarity_NK: Tensor, shares_NKC: Tensor, temperature: float = 0.02) -> Tensor:
    """The class shares of each query, (N, C): those of its neighbours, weighted by softmax(cosine / temperature).

    Args:
        similarity_NK: cosine of each query with its K nearest memory patches.
        shares_NKC: their class shares.
        temperature: smaller ones give nearer neighbours more weight.
    """
    weight_NK = (similarity_NK / temperature).softmax(dim=1)
    return torch.einsum("nk,nkc->nc", weight_NK, shares_NKC)


def segment(shares_hwC: Tensor, height: int, width: int) -> Tensor:
    """The class of each pixel, (H, W): shares enlarged bilinearly, then the largest."""
    enlarged_1CHW = functional.interpolate(shares_hwC.permute(2, 0, 1)[None], (height, width), mode="bilinear")
    return enlarged_1CHW[0].argmax(dim=0)
