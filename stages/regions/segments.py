"""Superpixels of one image: OpenCV's SLIC family, or the grid that the ablation compares it with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from stages.data.images import ImageError, decode
from stages.data.tables import pack_labels
from stages.regions.settings import SuperpixelsConfig

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact

_MOST = 65536  # labels that uint16 holds
_ALGORITHMS = {"slic": cv2.ximgproc.SLIC, "slico": cv2.ximgproc.SLICO, "mslic": cv2.ximgproc.MSLIC}


def segment_row(row: dict[str, Any], settings: SuperpixelsConfig) -> dict[str, Any]:
    """The row of `superpixels` for a row of `images`, and what the stage counts."""
    pixels = decode(row["image"])
    labels, count = segment(pixels, settings)
    small = settings.algorithm != "grid" and too_small(pixels, settings.region_size)
    return {"labels": pack_labels(labels), "count": count, "superpixels": count, "too_small": int(small)}


def segment(pixels: NDArray[np.uint8], settings: SuperpixelsConfig) -> tuple[NDArray[np.uint16], int]:
    """Labels (H, W) of an image (H, W, 3), every one of 0..n-1 in use, and n. Raises ImageError above 65536."""
    height, width = pixels.shape[:2]
    if settings.algorithm == "grid" or too_small(pixels, settings.region_size):
        labels = grid_labels(height, width, settings.region_size)
    else:
        labels = slic_labels(pixels, settings)
    return without_gaps(labels)


def too_small(pixels: NDArray[np.uint8], region_size: int) -> bool:
    """Whether an image (H, W, 3) is too small for SLIC, and gets a grid."""
    return min(pixels.shape[:2]) < 2 * region_size


def slic_labels(pixels: NDArray[np.uint8], settings: SuperpixelsConfig) -> NDArray[np.int32]:
    """OpenCV's SLIC, SLICO or MSLIC on an image (H, W, 3): labels (H, W), not all of which need be in use."""
    if settings.blur_sigma is not None:
        pixels = np.asarray(cv2.GaussianBlur(pixels, (3, 3), settings.blur_sigma), np.uint8)
    engine = cv2.ximgproc.createSuperpixelSLIC(
        pixels, _ALGORITHMS[settings.algorithm], settings.region_size, settings.compactness
    )
    engine.iterate(settings.iterations)
    engine.enforceLabelConnectivity(settings.min_element)
    return np.asarray(engine.getLabels(), np.int32)


def grid_labels(height: int, width: int, region_size: int) -> NDArray[np.int32]:
    """Rectangles as near to `region_size` squares as divide the image evenly."""
    rows, columns = max(1, round(height / region_size)), max(1, round(width / region_size))
    y = np.arange(height) * rows // height
    x = np.arange(width) * columns // width
    return (y[:, None] * columns + x[None]).astype(np.int32)


def without_gaps(labels: NDArray[np.int32]) -> tuple[NDArray[np.uint16], int]:
    """The same regions under the names 0..n-1, in the order of their old names."""
    used = np.bincount(labels.ravel()) > 0
    count = int(used.sum())
    if count > _MOST:
        raise ImageError(f"{count} superpixels, a map holds {_MOST} (raise region_size)")
    names = (np.cumsum(used) - 1).astype(np.uint16)
    return names[labels], count


def show_superpixels(images: Artifact, settings: SuperpixelsConfig, pictures: int = 6) -> bytes:
    """A contact sheet: some photographs with the borders of their superpixels."""
    from stages.data.pictures import draw_superpixels, grid
    from stages.data.rows import sample_rows

    cells, captions = [], []
    for row in sample_rows(images, pictures, ["key", "image"]):
        try:
            pixels = decode(row["image"])
            labels, count = segment(pixels, settings)
        except Exception:  # it is among the stage's problems already
            continue
        cells.append(draw_superpixels(pixels, labels, side=448))
        captions.append(f"{row['key']}: {count} superpixels")
    return grid(cells, 3, captions, title=f"Superpixels ({settings.algorithm}, {settings.region_size} px)", cell=448)
