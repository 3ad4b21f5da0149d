"""Superpixels: OpenCV's regions under names without gaps, the grid, and images that OpenCV cannot take."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from stages.data.images import ImageError
from stages.data.tables import unpack_labels
from stages.regions.segments import grid_labels, segment, segment_row, without_gaps
from stages.regions.superpixels import Superpixels


def settings(**options: object) -> Superpixels.Config:
    return Superpixels.Config.model_validate({"images": "images", **options})


@pytest.fixture(scope="module")
def picture() -> NDArray[np.uint8]:
    """Blobs of colour with noise: (120, 170, 3)."""
    rng = np.random.default_rng(0)
    blobs = cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (170, 120), interpolation=cv2.INTER_CUBIC)
    return np.clip(blobs + rng.normal(0, 6, blobs.shape), 0, 255).astype(np.uint8)


def test_slic_is_opencvs_on_the_blurred_image(picture: NDArray[np.uint8]) -> None:
    blurred = cv2.GaussianBlur(picture, (3, 3), 4)
    engine = cv2.ximgproc.createSuperpixelSLIC(blurred, cv2.ximgproc.SLIC, 20, 10.0)
    engine.iterate(5)
    engine.enforceLabelConnectivity(25)
    labels, count = segment(picture, settings())
    assert count == engine.getNumberOfSuperpixels()
    assert (labels == engine.getLabels()).all()
    assert (segment(picture, settings(blur_sigma=None))[0] != labels).any()


@pytest.mark.parametrize("algorithm", ["slic", "slico", "mslic", "grid"])
@pytest.mark.parametrize("region_size", [5, 20])
def test_every_label_is_used_and_is_one_region(picture: NDArray[np.uint8], algorithm: str, region_size: int) -> None:
    labels, count = segment(picture, settings(algorithm=algorithm, region_size=region_size))
    assert labels.dtype == np.uint16
    assert labels.shape == picture.shape[:2]
    assert np.unique(labels).tolist() == list(range(count))
    nominal = picture.shape[0] * picture.shape[1] / region_size**2
    assert nominal / 3 < count < nominal * (8 if algorithm == "mslic" else 3)  # mslic splits where content is rich
    for label in range(count):
        assert cv2.connectedComponents((labels == label).astype(np.uint8), connectivity=4)[0] == 2


@pytest.mark.parametrize("algorithm", ["slic", "slico", "mslic"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 100), (3, 3), (5, 15), (39, 300), (40, 40)])
def test_tiny_images_do_not_end_the_process(algorithm: str, shape: tuple[int, int]) -> None:
    """OpenCV's SLIC takes the process down below half a superpixel; such images get the grid."""
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    labels, count = segment(pixels, settings(algorithm=algorithm))
    assert np.unique(labels).tolist() == list(range(count))
    if min(shape) < 40:
        assert (labels == grid_labels(*shape, 20)).all()


def test_grid() -> None:
    labels = grid_labels(4, 7, 2)
    assert labels.tolist() == [[0, 0, 1, 1, 2, 2, 3]] * 2 + [[4, 4, 5, 5, 6, 6, 7]] * 2
    sides = np.bincount(grid_labels(1, 100, 30)[0])
    assert sides.tolist() == [34, 33, 33]


def test_names_without_gaps() -> None:
    labels, count = without_gaps(np.array([[7, 7, 2], [2, 9, 7]], np.int32))
    assert (labels.tolist(), count) == ([[1, 1, 0], [0, 2, 1]], 3)


def test_more_superpixels_than_uint16_holds() -> None:
    assert without_gaps(np.arange(65536, dtype=np.int32)[None])[1] == 65536
    with pytest.raises(ImageError, match="65537 superpixels, a map holds 65536"):
        without_gaps(np.arange(65537, dtype=np.int32)[None])


def test_the_row_holds_the_map(picture: NDArray[np.uint8]) -> None:
    data = cv2.imencode(".png", picture[:, :, ::-1])[1].tobytes()
    row = segment_row({"image": data}, settings())
    labels, count = segment(picture, settings())
    assert (unpack_labels(row["labels"]) == labels).all()
    assert (row["count"], row["too_small"]) == (count, 0)
    assert segment_row({"image": data}, settings(region_size=70))["too_small"] == 1
