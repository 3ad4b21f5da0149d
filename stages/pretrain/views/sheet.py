"""A contact sheet of one batch: every image's views side by side, with the rectangles that they share.

Each image is one row. Its first view has a numbered rectangle for every other view, and that view has the same
rectangle under the same number: equal numbers must show the same thing (mirrored where the caption says so). Behind the
views come a method's own panels: what it makes of them, with its regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stages.data.pictures import draw_boxes, draw_superpixels, grid
from stages.pretrain.data.batch import Batch
from stages.pretrain.views.geometry import flipped, overlap
from stages.pretrain.views.plan import ViewPlan

DIM = 0.35  # brightness of what belongs to no region


@dataclass(frozen=True)
class Panel:
    """One more picture of every image in a sheet: a view as the method changes it, and the method's regions in it."""

    caption: str
    view: Tensor  # (B, 3, S, S), normalised as the views are
    boxes: Tensor | None = None  # (B, K, 4) rectangles in its pixels; number k is the same region in every panel
    regions: Tensor | None = None  # (B, S, S): the region of each pixel; below 0: none, shown dark


def view_sheet(
    batch: Batch,
    plan: ViewPlan,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    panels: Sequence[Panel] = (),
    images: int = 4,
    side: int = 200,
    title: str | None = None,
) -> bytes:
    """The sheet of the batch's first images.

    Args:
        batch: views with their affines.
        plan: the views' plan, which says which of them show a neighbour.
        mean: of red, green, blue, with which the views were normalised.
        std: likewise.
        panels: the method's own, of the same images.
        images: number of images at most.
        side: of a cell, in pixels.
        title: above the sheet.

    Returns:
        A PNG file.
    """
    neighbors = {spec.name for spec in plan.views if spec.of == "neighbor"}
    names = [(name, v) for name, views in batch.views.items() for v in range(len(views))]
    first = next((name, v) for name, v in names if name not in neighbors)
    pictures, captions = [], []
    for b in range(min(images, len(batch))):
        anchor = batch.affines[first[0]][first[1], b].cpu()
        anchor_size = batch.views[first[0]].shape[-1]
        numbered: list[tuple[str, NDArray[np.float32]]] = []
        row: list[tuple[NDArray[np.uint8], str, list[tuple[str, NDArray[np.float32]]]]] = []
        for number, (name, v) in enumerate(names):
            if name in neighbors:
                row.append((*_neighbor(batch, name, v, b, mean, std), []))
                continue
            affine, size = batch.affines[name][v, b].cpu(), batch.views[name].shape[-1]
            caption = f"{name} {v}{', mirrored' if flipped(affine) else ''}"
            boxes = []
            if (name, v) != first:
                there, here, valid = overlap(anchor, affine, anchor_size, size)
                if valid:
                    numbered.append((str(number), there.numpy()))
                    boxes = [(str(number), here.numpy())]
            row.append((_pixels(batch.views[name][v, b], mean, std), caption, boxes))
        at = names.index(first)
        row[at] = (row[at][0], f"image {int(batch.image_ids[b])}: {row[at][1]}", numbered)
        for picture, caption, shared in row:
            corners = np.array([box for _, box in shared], np.float32).reshape(-1, 4)
            pictures.append(draw_boxes(picture, corners, [number for number, _ in shared], side=side))
            captions.append(caption)
        for panel in panels:
            pictures.append(_panel(panel, b, mean, std, side))
            captions.append(panel.caption)
    return grid(pictures, len(names) + len(panels), captions, cell=side, title=title)


def _panel(panel: Panel, b: int, mean: Sequence[float], std: Sequence[float], side: int) -> NDArray[np.uint8]:
    picture = _pixels(panel.view[b], mean, std)
    if panel.regions is not None:
        regions = panel.regions[b].cpu().numpy()
        picture = np.where((regions < 0)[..., None], picture * DIM, picture).astype(np.uint8)
        picture = draw_superpixels(picture, regions, side=side)
    if panel.boxes is not None:
        boxes = panel.boxes[b].cpu().float().numpy()
        picture = draw_boxes(picture, boxes, [str(k + 1) for k in range(len(boxes))], side=side)
    return picture


def _neighbor(
    batch: Batch, name: str, v: int, b: int, mean: Sequence[float], std: Sequence[float]
) -> tuple[NDArray[np.uint8], str]:
    """Pixels and caption of an image's neighbour; black where there is none."""
    assert batch.neighbor_ids is not None
    views = batch.views[name][v]
    if batch.neighbor_ids[b] < 0:
        return np.zeros((*views.shape[-2:], 3), np.uint8), f"{name}: none"
    at = int((batch.neighbor_ids[:b] >= 0).sum())  # views hold the neighbours that there are
    return _pixels(views[at], mean, std), f"{name}: image {int(batch.neighbor_ids[b])}"


def _pixels(view_3SS: Tensor, mean: Sequence[float], std: Sequence[float]) -> NDArray[np.uint8]:
    values = view_3SS.detach().float().cpu().permute(1, 2, 0).numpy() * np.array(std) + np.array(mean)
    return np.clip(np.rint(values * 255), 0, 255).astype(np.uint8)
