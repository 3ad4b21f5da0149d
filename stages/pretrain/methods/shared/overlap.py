"""Resamples the feature maps of two views to the region that both show, so that cell k of one is cell k of the other.

Source: docs/methods.md#views-and-overlap.

Shape legend: B images of this rank, D channels, h w sides of a map, N patches of all images, K prototypes, S side of
the resampled grid.
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
    """Where one view of every image lies: the maps from its pixels to those of the stored images."""

    affine: Tensor  # (B, 2, 3): view pixels -> stored-image pixels
    size: int  # side in pixels


def views_of(batch: Batch) -> list[ViewGeometry]:
    """The geometry of all crops, in the order of `SelfDistillation.student_features`: global crops, then local ones."""
    return [
        ViewGeometry(affine_B23, batch.views[name].shape[-1])
        for name in ("global", "local")
        if name in batch.views
        for affine_B23 in batch.affines[name]
    ]


def resample(map_BDhw: Tensor, box_B4: Tensor, view: ViewGeometry, grid: int, *, may_flip: bool) -> Tensor:
    """Resamples a box of every image's feature map to a grid, by RoIAlign.

    Args:
        map_BDhw: feature maps of the view.
        box_B4: x0, y0, x1, y1 in the view's pixels.
        view: the view's geometry.
        grid: S.
        may_flip: whether views may be mirrored; the grid of a mirrored view is mirrored back.

    Returns:
        (B, D, S, S), with the image's left on the left.
    """
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
    """Dense alignment of every global crop of the teacher with every other crop of the student.

    Source: docs/methods.md#dense-alignment (CoTAP, Eq. 4 and 5).

    Args:
        student_maps: the student's scores of every crop, (B, K, h, w) each.
        target_maps: the teacher's soft assignments of the global crops, (B, K, h, w) each.
        views: the geometry of every crop, global ones first.
        settings: temperature and grid.
        may_flip: whether views may be mirrored.

    Returns:
        A scalar: the mean over the pairs of crops that overlap, of all ranks.
    """
    losses, valid = [], []
    for target, online, box_target_B4, box_online_B4, valid_B in _pairs(views, len(target_maps)):
        targets = resample(target_maps[target], box_target_B4, views[target], settings.grid, may_flip=may_flip)
        scores = resample(student_maps[online], box_online_B4, views[online], settings.grid, may_flip=may_flip)
        losses.append(dense_alignment_loss(scores, targets, temperature=settings.temperature))
        valid.append(valid_B)
    return mean_of(torch.cat(losses), torch.cat(valid))


def assign_patches(scores_BKhw: Tensor, settings: DenseSettings) -> Tensor:
    """The teacher's soft assignments of the patches of one crop: Sinkhorn over the patches of all images of all ranks.

    Source: docs/methods.md#dense-alignment.

    Returns:
        (B, K, h, w), summing to 1 over K.
    """
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


def mean_of(value_B: Tensor, chosen_B: Tensor | None = None) -> Tensor:
    """Mean over the chosen images or pairs of all ranks; 0 if none is chosen.

    Args:
        value_B: one value for each image or pair of this rank; B may be 0, and differ between ranks.
        chosen_B: bool, which of them count; None: all.

    Returns:
        A scalar: this rank's share of the mean. The average of the shares over ranks is the mean.
    """
    chosen_B = torch.ones_like(value_B) if chosen_B is None else chosen_B.to(value_B.dtype)
    count = all_reduce_sum(chosen_B.sum())
    return torch.where(chosen_B > 0, value_B, 0).sum() * world_size() / count.clamp(min=1)


def _pairs(views: list[ViewGeometry], targets: int) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:
    """Index of the target crop, of the student's crop, the overlap in the pixels of each, and where there is one."""
    for target in range(targets):
        for online in range(len(views)):
            if online != target:
                a, b = views[target], views[online]
                yield (target, online, *overlap(a.affine, b.affine, a.size, b.size))
