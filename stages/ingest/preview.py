"""The contact sheet of an `images` artifact: photographs from all over the set, with their masks or boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.data.images import decode, decode_mask
from stages.data.pictures import class_colours, colour_mask, draw_boxes, grid
from stages.ingest.layout import Item, Layout, Vocabulary
from stages.ingest.rows import check
from stages.ingest.write import spread

CELLS = 12
_BOXES = 8  # of an image, the largest; more would hide it
_LEGEND = 30  # most names in a legend that can still be read


def contact_sheet(layout: Layout, vocabulary: Vocabulary, items: Sequence[Item]) -> bytes:
    """PNG of up to 12 usable images, evenly spread over the keys."""
    candidates = spread(items, 2 * CELLS)  # more than cells: some of them may not be usable
    rows: list[dict[str, Any]] = []
    for item in candidates[::2] + candidates[1::2]:
        if len(rows) < CELLS and (row := check(layout, vocabulary, item, layout.reader([item])).row):
            rows.append(row)
    rows.sort(key=lambda row: str(row["key"]))
    classes = vocabulary.mask_classes or tuple(str(i) for i in range(256))
    pictures = [_picture(row, classes, vocabulary.ignore_index, layout.config.max_pixels) for row in rows]
    captions = [f"{row['label']}: {row['key']}" if row["label"] else row["key"] for row in rows]
    named = any(row["mask"] for row in rows) and len(classes) <= _LEGEND
    legend = list(zip(classes, class_colours(len(classes)), strict=True)) if named else []
    return grid(pictures, 4, captions, legend=legend)


def _picture(row: dict[str, Any], classes: Sequence[str], ignore_index: int, max_pixels: int) -> NDArray[np.uint8]:
    picture = decode(row["image"], max_pixels=max_pixels)
    if row["mask"] is not None:
        mask = decode_mask(row["mask"], max_pixels=max_pixels)
        coloured = colour_mask(mask, classes, ignore_index=ignore_index, image=picture)
        background = (mask == 0)[:, :, None] & (classes[:1] == ("background",))
        picture = np.where(background, picture, coloured)
    if row["objects"]:
        largest = sorted(row["objects"], key=lambda entry: _area(entry["box"]), reverse=True)[:_BOXES]
        boxes = np.array([entry["box"] for entry in largest], np.float32)
        picture = draw_boxes(picture, boxes, [entry["category"] for entry in largest])
    return picture


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
