"""Feature maps of two views, resampled to what both show: cell k of one is cell k of the other.

Shape legend: B images, D channels, S side of the resampled grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.pretrain.config.parts import DenseSettings
from stages.pretrain.data.batch import Batch
from stages.pretrain.losses.dense_alignment import dense_alignment_loss
from stages.pretrain.losses.roi_align import roi_align
from stages.pretrain.losses.sinkhorn import sinkhorn
from stages.pretrain.views.geometry import flipped, overlap, unmirror
from stages.training.collectives import all_reduce_max, all_reduce_sum, world_size


@dataclass(frozen=True)
class ViewGeometry:
    """Where one crop of every image lies."""

    affine: Tensor  # (B, 2, 3)
    size: int  # pixels a side


def views_of(batch: Batch) -> list[ViewGeometry]:
    """The crops in the order of `SelfDistillation.student_features`: globals, then locals."""
    return [
        ViewGeometry(affine_B23, batch.views[name].shape[-1])
        for name in ("global", "local")
        if name in batch.views
        for affine_B23 in batch.affines[name]
    ]


def resample(map_BDhw: Tensor, box_B4: Tensor, view: ViewGeometry, grid: int, *, may_flip: bool) -> Tensor:
    """RoIAlign of a box in the view's pixels to (B, D, S, S), left as in the image (where views `may_flip`)."""
    height, width = map_BDhw.shape[2:]
    scale = box_B4.new_tensor([width, height, width, height]) / view.size
    region = roi_align(map_BDhw, box_B4 * scale, size=grid)
    return unmirror(region, flipped(view.affine)) if may_flip else region


def align_patches(
    student_maps: list[Tensor],
    target_maps: list[Tensor],
    views: list[ViewGeometry],
    settings: DenseSettings,
    *,
    may_flip: bool,
) -> Tensor:
    """Dense alignment over all ordered pairs of a target global crop and another online crop
    (docs/methods.md#dense-alignment).

    Args:
        student_maps: scores (B, K, h, w) of all crops. target_maps: soft assignments (B, K, h, w) of the global ones.

    Returns: a scalar, the mean over pairs with an overlap (of all ranks).
    """
    losses, valid = [], []
    for target, online, box_target_B4, box_online_B4, valid_B in _pairs(views, len(target_maps)):
        targets = resample(target_maps[target], box_target_B4, views[target], settings.grid, may_flip=may_flip)
        scores = resample(student_maps[online], box_online_B4, views[online], settings.grid, may_flip=may_flip)
        losses.append(dense_alignment_loss(scores, targets, temperature=settings.temperature))
        valid.append(valid_B)
    return mean_of(torch.cat(losses), torch.cat(valid))


def assign_patches(scores_BKhw: Tensor, settings: DenseSettings) -> Tensor:
    """Sinkhorn over all patches of all images (and ranks) of one target crop: (B, K, h, w)."""
    rows_NK = scores_BKhw.permute(0, 2, 3, 1).flatten(0, 2)
    q_NK = sinkhorn(
        rows_NK,
        epsilon=settings.epsilon,
        iterations=settings.iterations,
        all_reduce=all_reduce_sum,
        all_reduce_max=all_reduce_max,
    )
    batch, _, height, width = scores_BKhw.shape
    return q_NK.reshape(batch, height, width, -1).permute(0, 3, 1, 2)


def mean_of(value_B: Tensor, chosen_B: Tensor) -> Tensor:
    """Mean over the chosen ones of all ranks, as a share whose average over ranks is that mean; 0 if none is chosen."""
    chosen_B = chosen_B.to(value_B.dtype)
    count = all_reduce_sum(chosen_B.sum())
    return torch.where(chosen_B > 0, value_B, 0).sum() * world_size() / count.clamp(min=1)


def _pairs(views: list[ViewGeometry], targets: int) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:
    for target in range(targets):
        for online in range(len(views)):
            if online != target:
                a, b = views[target], views[online]
                yield (target, online, *overlap(a.affine, b.affine, a.size, b.size))
