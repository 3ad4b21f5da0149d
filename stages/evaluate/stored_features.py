"""Streams stored features with what is known of their images; memory stays at a few images.

Shape legend: D width, h w grid of an image's patches, H W sides of its mask.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SourceError
from stages.data.images import ImageError
from stages.data.mask_classes import MaskClasses, MaskLabels
from stages.data.prepared import split_error
from stages.data.rows import iter_rows, iter_single

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact

NO_FEATURES = "it has no features (see the problems of their stage)"  # why an image could not be used


class ImageFeatures(NamedTuple):
    """One image as the encoder gave it, in float32, not normalised."""

    image_id: int
    key: str
    vector: NDArray[np.float32]  # (D,)
    map: NDArray[np.float32] | None  # (h, w, D); None where patches were not asked for


def iter_features(features: Artifact, ids: Collection[int], *, patches: bool = True) -> Iterator[ImageFeatures]:
    """The features of these images, in the order of their ids; images that have none are left out.

    Args:
        features: an artifact of kind `features`.
        ids: of the images.
        patches: read the maps too, which are most of the bytes.

    Raises: ArtifactDamaged.
    """
    columns = ["key", "vector", *(("patches", "grid_height", "grid_width") if patches else ())]
    for row in iter_single(features, columns, ids):
        [image_id], [key] = row["image_id"].to_pylist(), row["key"].to_pylist()
        map_hwD = None
        if patches:
            [height], [width] = row["grid_height"].to_pylist(), row["grid_width"].to_pylist()
            map_hwD = row["patches"][0].values.to_numpy().astype(np.float32).reshape(height, width, -1)
        yield ImageFeatures(image_id, key, row["vector"][0].values.to_numpy().astype(np.float32), map_hwD)


class MaskedImage(NamedTuple):
    """One image's map, and the classes of its pixels."""

    image_id: int
    key: str
    map: NDArray[np.float32]  # (h, w, D)
    labels: MaskLabels  # (H, W) at the mask's own size; -1: void


def masked_ids(stage: str, images: Artifact, splits: dict[str, str]) -> dict[str, list[int]]:
    """Ids of the images of each split that have a mask.

    Args:
        stage: its name in the pipeline, for the error.
        images: the artifact.
        splits: option of the stage -> the split that it names.

    Raises: SourceError for a split without masks.
    """
    found: dict[str, list[int]] = {option: [] for option in splits}
    for row in iter_rows(images, ["split", "mask"]):
        for option, split in splits.items():
            if row["split"] == split and row["mask"] is not None:
                found[option].append(row["image_id"])
    for option, split in splits.items():
        if not found[option]:
            remedy = f"set stages.{stage}.{option} to a split that has, or ingest with a layout that has masks"
            raise split_error(stage, images, split, "a mask", remedy)
    return found


def iter_masked(
    images: Artifact,
    features: Artifact,
    classes: MaskClasses,
    ids: Collection[int],
    problems: list[dict[str, str]],
) -> Iterator[MaskedImage]:
    """Maps and masks of these images together, in the order of their ids.

    Args:
        images: the artifact that holds the masks.
        features: of these images.
        classes: of the masks.
        ids: of the images.
        problems: grows by an entry for each image that has no features or whose mask cannot be used.
    """
    rows = iter_rows(images, ["key", "mask", "width", "height"], ids=ids)
    found = iter_features(features, ids)
    image = next(found, None)
    for row in rows:
        while image is not None and image.image_id < row["image_id"]:
            image = next(found, None)
        if image is None or image.image_id != row["image_id"]:
            problems.append({"key": str(row["key"]), "reason": NO_FEATURES})
            continue
        try:
            labels_HW = classes.labels(row["mask"], (row["height"], row["width"]))
        except ImageError as error:
            problems.append({"key": str(row["key"]), "reason": str(error)})
            continue
        assert image.map is not None
        yield MaskedImage(image.image_id, image.key, image.map, labels_HW)


def require_some(stage: str, count: int, which: str, problems: list[dict[str, str]]) -> None:
    """Raises SourceError where no image could be used."""
    if not count:
        first = f"; the first is {problems[0]['key']}: {problems[0]['reason']}" if problems else ""
        raise SourceError(f"{stage}: none of the {which} images can be used{first}")
