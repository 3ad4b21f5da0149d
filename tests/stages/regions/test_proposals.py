"""Selective search: the set is OpenCV's, the filter is the paper's, the order is ours and never changes."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from stages.data.images import decode
from stages.regions.proposals import keep, pairwise_iou, propose, rank, search
from stages.regions.selective_search import SelectiveSearch

Settings = SelectiveSearch.Config


def settings(**options: object) -> SelectiveSearch.Config:
    return Settings.model_validate({"images": "images", **options})


@pytest.fixture(scope="module")
def photograph(quickstart_data: Path) -> NDArray[np.uint8]:
    files = sorted(path for path in quickstart_data.rglob("*.jpg"))
    if not files:
        pytest.skip("needs the photographs of configs/quickstart")
    return decode(files[0].read_bytes())


def opencv_set(image: NDArray[np.uint8]) -> set[tuple[float, ...]]:
    engine = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    engine.setBaseImage(np.ascontiguousarray(image[:, :, ::-1]))
    engine.switchToSelectiveSearchFast(150, 150, 0.9)
    return {(float(x), float(y), float(x + w), float(y + h)) for x, y, w, h in engine.process()}


def test_the_set_is_opencvs(photograph: NDArray[np.uint8]) -> None:
    found = search(photograph, settings(size=None))
    assert {tuple(box) for box in found.tolist()} == opencv_set(photograph)


def test_same_boxes_in_the_same_order_every_time(photograph: NDArray[np.uint8]) -> None:
    """OpenCV's own order differs between these calls: it draws from C's rand()."""
    first, whole = propose(photograph, settings())
    assert not whole
    assert len(first) > 20
    for _ in range(2):
        again, _ = propose(photograph, settings())
        assert (again == first).all()


def test_boxes_are_in_pixels_of_the_stored_image(photograph: NDArray[np.uint8]) -> None:
    height, width = photograph.shape[:2]
    assert max(height, width) > 320
    found = search(photograph, settings())
    assert found[:, 2].max() == pytest.approx(width)
    assert found[:, 3].max() == pytest.approx(height)
    assert found.min() == 0


def test_what_is_kept_obeys_the_paper(photograph: NDArray[np.uint8]) -> None:
    height, width = photograph.shape[:2]
    boxes, _ = propose(photograph, settings(max_boxes=30))
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    scale = np.sqrt(w * h / (width * height))
    assert len(boxes) == 30
    assert boxes.dtype == np.float32
    assert min(w.min(), h.min()) >= 32
    assert (w / h).max() <= 3
    assert (w / h).min() >= 1 / 3
    assert scale.min() >= 0.3
    assert scale.max() <= 0.8
    assert (propose(photograph, settings(max_boxes=7))[0] == boxes[:7]).all()


@pytest.mark.parametrize(
    ("box", "kept"),
    [
        ((0, 0, 40, 40), True),
        ((0, 0, 31.9, 40), False),  # too narrow
        ((0, 0, 96, 32), True),
        ((0, 0, 97, 32), False),  # too flat
        ((0, 0, 32, 97), False),  # too tall
        ((0, 0, 81, 81), False),  # too large: sqrt(w h) = 0.81 sqrt(W H)
        ((0, 0, 80, 80), True),
    ],
)
def test_each_rule_of_the_filter(box: tuple[float, ...], kept: bool) -> None:
    assert (len(keep(np.array([box]), 100, 100, settings())) == 1) is kept


def test_too_small_a_share_of_the_image_is_dropped() -> None:
    box = np.array([[0, 0, 60.0, 59.0]])
    assert len(keep(box, 200, 200, settings())) == 0
    assert len(keep(box, 200, 195, settings())) == 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (40, 30), (64, 500), (100, 100)])
def test_an_image_without_boxes_gives_itself(shape: tuple[int, int]) -> None:
    boxes, whole = propose(np.full((*shape, 3), 90, np.uint8), settings())
    assert whole
    assert boxes.tolist() == [[0, 0, shape[1], shape[0]]]


def obvious_rank(boxes: list[list[float]]) -> list[int]:
    """The rule of `rank`, box by box."""

    def iou(a: list[float], b: list[float]) -> float:
        w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        shared = max(w, 0) * max(h, 0)
        return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)

    support = [round(sum(iou(a, b) for b in boxes if iou(a, b) > 0.6), 6) for a in boxes]
    order: list[int] = []
    while len(order) < len(boxes):
        left = [i for i in range(len(boxes)) if i not in order]
        order.append(min(left, key=lambda i: (sum(iou(boxes[i], boxes[j]) > 0.5 for j in order), -support[i], i)))
    return order


corner = st.integers(0, 12)


@given(st.sets(st.tuples(corner, corner, st.integers(4, 12), st.integers(4, 12)), min_size=1, max_size=25))
def test_rank_follows_its_rule(corners: set[tuple[int, int, int, int]]) -> None:
    boxes = [[float(x), float(y), float(x + w), float(y + h)] for x, y, w, h in sorted(corners)]
    array = np.array(boxes)
    assert (rank(array, len(boxes)) == array[obvious_rank(boxes)]).all()
    assert (rank(array, 3) == array[obvious_rank(boxes)[:3]]).all()


def test_iou() -> None:
    boxes = np.array([[0, 0, 2, 2], [1, 0, 3, 2], [5, 5, 6, 6]], float)
    assert pairwise_iou(boxes) == pytest.approx(np.array([[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 1]]))
