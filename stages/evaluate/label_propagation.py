"""Soft labels carried from earlier frames of a video to the next by feature similarity.

Source: docs/methods.md#label-propagation.

Shape legend: h w sides of a feature map, F context frames, D width, L labels (objects and background), W = 2 r + 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor


def propagate_labels(
    target_Dhw: Tensor,
    context_FDhw: Tensor,
    labels_FLhw: Tensor,
    *,
    radius: int = 12,
    topk: int = 5,
    temperature: float = 0.1,
) -> Tensor:
    """The next frame's soft labels, (L, h, w): each token gets those of the context tokens most similar to it.

    Affinity is exp(cos / T) inside a window of 2 r + 1 tokens around the same place of every context frame, 0 outside.
    The k largest of all frames together count (and all that equal the smallest of these), normalised to sum 1.
    One row of tokens is compared at a time, with W rows of every context frame, which bounds the memory.

    Args:
        target_Dhw: features of the frame; they need not be normalised.
        context_FDhw: features of the first frame and of some previous ones.
        labels_FLhw: their soft labels; those of previous frames as they were propagated, not rounded.
        radius: r in tokens; negative: no window.
        topk: k.
        temperature: T.
    """
    target_Dhw, context_FDhw = functional.normalize(target_Dhw, dim=0), functional.normalize(context_FDhw, dim=1)
    height, width = target_Dhw.shape[1:]
    reach = radius if radius >= 0 else max(height, width)
    column_w = torch.arange(width, device=target_Dhw.device)
    near_ww = (column_w[:, None] - column_w).abs() <= reach
    rows = []
    for y in range(height):
        low, high = max(0, y - reach), min(height, y + reach + 1)
        cosine_wFWw = torch.einsum("dx,fdyc->xfyc", target_Dhw[:, y], context_FDhw[:, :, low:high])
        affinity_wN = ((cosine_wFWw / temperature).exp() * near_ww[:, None, None]).flatten(1)
        if affinity_wN.shape[1] > topk:
            smallest_w1 = affinity_wN.topk(topk, dim=1).values[:, -1:]
            affinity_wN = torch.where(affinity_wN >= smallest_w1, affinity_wN, 0)
        affinity_wN = affinity_wN / affinity_wN.sum(dim=1, keepdim=True)
        labels_LN = labels_FLhw[:, :, low:high].transpose(0, 1).flatten(1)
        rows.append(labels_LN @ affinity_wN.T)
    return torch.stack(rows, dim=1)


def stretch_labels(labels_LHW: Tensor) -> Tensor:
    """Each label's map shifted and scaled to [0, 1], before the argmax of the output; a map of zeros stays as it is."""
    low_L11, high_L11 = labels_LHW.amin(dim=(1, 2), keepdim=True), labels_LHW.amax(dim=(1, 2), keepdim=True)
    range_L11 = high_L11 - low_L11
    stretched_LHW = (labels_LHW - low_L11) / torch.where(range_L11 > 0, range_L11, 1)
    return torch.where(high_L11 > 0, stretched_LHW, labels_LHW)
