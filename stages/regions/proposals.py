"""Selective search on one image: OpenCV's boxes, filtered and put in an order that is ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from stages.data.images import decode
from stages.regions.settings import SelectiveSearchConfig

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact

Boxes: TypeAlias = NDArray[np.float32]  # (n, 4): x0, y0, x1, y1 in pixels, continuous: the width is x1 - x0

_SUPPORT, _OVERLAP = 0.6, 0.5  # IoU from which a box supports another, or stands in its way


def propose_row(row: dict[str, Any], settings: SelectiveSearchConfig) -> dict[str, Any]:
    """The row of `boxes` for a row of `images`, and what the stage counts."""
    boxes, whole = propose(decode(row["image"]), settings)
    return {"boxes": boxes.tolist(), "total_boxes": len(boxes), "whole_image": int(whole)}


def propose(pixels: NDArray[np.uint8], settings: SelectiveSearchConfig) -> tuple[Boxes, bool]:
    """At most `max_boxes` boxes of an image (H, W, 3), best first, and whether they are only the whole image.

    The same image and settings give the same boxes in the same order, whatever else the process computes.
    """
    height, width = pixels.shape[:2]
    boxes = keep(search(pixels, settings), width, height, settings)
    if len(boxes) == 0:
        return np.array([[0, 0, width, height]], np.float32), True
    return rank(boxes, settings.max_boxes).astype(np.float32), False


def search(pixels: NDArray[np.uint8], settings: SelectiveSearchConfig) -> NDArray[np.float64]:
    """All boxes of OpenCV's selective search, in pixels of the image, sorted by their coordinates.

    OpenCV returns a set without duplicates in an order that C's rand() decides; only the set is used.
    """
    height, width = pixels.shape[:2]
    small = pixels
    if settings.size is not None and max(height, width) > settings.size:
        scale = settings.size / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        small = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
    engine = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    engine.setBaseImage(np.ascontiguousarray(small[:, :, ::-1]))  # it wants BGR
    if settings.strategy == "fast":
        engine.switchToSelectiveSearchFast(settings.base_k, settings.inc_k, settings.sigma)
    elif settings.strategy == "quality":
        engine.switchToSelectiveSearchQuality(settings.base_k, settings.inc_k, settings.sigma)
    else:
        engine.switchToSingleStrategy(settings.base_k, settings.sigma)
    x, y, w, h = np.asarray(engine.process(), np.float64).reshape(-1, 4).T
    corners = np.stack([x, y, x + w, y + h], 1)
    corners = corners[np.lexsort(corners.T[::-1])]
    return corners * np.tile([width / small.shape[1], height / small.shape[0]], 2)


def keep(boxes: NDArray[np.float64], width: int, height: int, settings: SelectiveSearchConfig) -> NDArray[np.float64]:
    """Those of a size and shape that D3SSL trains on (rules of SoCo's released code)."""
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    scale = np.sqrt(w * h / (width * height))
    good = (np.minimum(w, h) >= settings.min_side) & (np.maximum(w, h) <= settings.max_aspect * np.minimum(w, h))
    return boxes[good & (scale >= settings.min_scale) & (scale <= settings.max_scale)]


def rank(boxes: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """The first `count` boxes, best first, of a set sorted by coordinates.

    Next is always the box in whose way the fewest boxes already taken stand (IoU > 0.5); of these the one with most
    support, the sum of IoU over the boxes with IoU > 0.6: what many groupings found is there. Ties go by coordinates.
    Against OpenCV's random order on 60 photographs of COCO, the share of object boxes met at IoU 0.5: first 10 boxes
    0.73 for 0.53, first 30 0.93 for 0.80, first 100 0.95 for 0.93.
    """
    overlap = pairwise_iou(boxes)
    support = np.where(overlap > _SUPPORT, overlap, 0).sum(1).round(6)  # rounded: no tie hangs on the order of a sum
    in_way = (overlap > _OVERLAP).astype(np.int64)
    blocked = np.zeros(len(boxes), np.int64)
    taken: list[int] = []
    for _ in range(min(count, len(boxes))):
        level = blocked == blocked.min()
        best = int(np.where(level, support, -1.0).argmax())
        taken.append(best)
        blocked += in_way[best]
        blocked[best] = np.iinfo(np.int64).max // 2
    return boxes[taken]


def pairwise_iou(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, 4) -> (n, n)."""
    sides = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    shared = np.clip(sides, 0, None).prod(2)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return shared / (area[:, None] + area[None] - shared)


def show_boxes(images: Artifact, settings: SelectiveSearchConfig, pictures: int = 8, boxes: int = 5) -> bytes:
    """A contact sheet: the first few boxes of some photographs."""
    from stages.data.pictures import draw_boxes, grid
    from stages.data.rows import sample_rows

    cells, captions = [], []
    for row in sample_rows(images, pictures, ["key", "image"]):
        try:
            pixels = decode(row["image"])
        except Exception:  # it is among the stage's problems already
            continue
        found, whole = propose(pixels, settings)
        cells.append(draw_boxes(pixels, found[:boxes]))
        captions.append(
            f"{row['key']}: " + ("whole image" if whole else f"{min(boxes, len(found))} of {len(found)} boxes")
        )
    return grid(cells, 4, captions, title="Selective search: the best boxes")
