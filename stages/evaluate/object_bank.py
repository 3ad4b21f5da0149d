"""The objects of a split by their ground-truth boxes, and which of them enter a bank that is balanced over classes.

Source: docs/methods.md#k-nn-of-objects.

Shape legend: N objects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stages.data.prepared import split_error
from stages.data.rows import iter_rows

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact


_LARGEST_BANK_CLASS = 500  # where the config names no cap


@dataclass(frozen=True)
class SplitObjects:
    """The objects of one split that have a class and are no crowd, in the order of the images."""

    images: NDArray[np.int64]  # (N,) image ids
    places: NDArray[np.int64]  # (N,) which object of its image it is
    labels: NDArray[np.int64]  # (N,)
    boxes: NDArray[np.float32]  # (N, 4) x0, y0, x1, y1 in pixels of the stored image
    keys: dict[int, str]  # of the images

    def __len__(self) -> int:
        return len(self.labels)

    def taken(self, rows: NDArray[np.int64]) -> SplitObjects:
        """Only these rows."""
        return SplitObjects(self.images[rows], self.places[rows], self.labels[rows], self.boxes[rows], self.keys)


def read_objects(stage: str, images: Artifact, option: str, split: str) -> SplitObjects:
    """The objects of a split.

    Args:
        stage: its name in the pipeline, for the error.
        images: the artifact.
        option: of the stage, which names the split.
        split: of the images.

    Raises: SourceError for a split without any.
    """
    found: list[tuple[int, int, int]] = []
    boxes: list[list[float]] = []
    keys: dict[int, str] = {}
    for row in iter_rows(images, ["key", "split", "objects"]):
        if row["split"] != split:
            continue
        for place, one in enumerate(row["objects"] or ()):
            label = -1 if one["category_id"] is None else one["category_id"]
            if not one["crowd"] and label >= 0:
                found.append((row["image_id"], place, label))
                boxes.append(one["box"])
                keys[row["image_id"]] = str(row["key"])
    if not found:
        remedy = f"set stages.{stage}.{option} to a split that has, or ingest with a layout that has boxes (coco, voc)"
        raise split_error(stage, images, split, "an object with a class that is no crowd", remedy)
    columns = np.array(found, np.int64)
    return SplitObjects(columns[:, 0], columns[:, 1], columns[:, 2], np.array(boxes, np.float32), keys)


def balanced(objects: SplitObjects, *, per_image: int | None, per_class: int | None, seed: int) -> SplitObjects:
    """The bank: a few objects of every image, then as many of every class, both drawn at random.

    A class with fewer objects than the cap gives all it has.

    Args:
        objects: of the train split.
        per_image: objects that an image gives at most; None: all.
        per_class: objects of a class at most; None: as many as the smallest class has, and 500 at most.
        seed: of the draws.
    """
    order = np.random.default_rng(seed).permutation(len(objects))
    if per_image is not None:
        order = order[_counted(objects.images[order]) < per_image]
    if per_class is None:
        sizes = np.bincount(objects.labels[order])
        per_class = min(int(sizes[sizes > 0].min()), _LARGEST_BANK_CLASS)
    order = order[_counted(objects.labels[order]) < per_class]
    return objects.taken(np.sort(order))


def _counted(values_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many equal values stand before each, (N,)."""
    order = np.argsort(values_N, kind="stable")
    ordered = values_N[order]
    starts = np.searchsorted(ordered, ordered)
    counted = np.empty(len(values_N), np.int64)
    counted[order] = np.arange(len(values_N)) - starts
    return counted
