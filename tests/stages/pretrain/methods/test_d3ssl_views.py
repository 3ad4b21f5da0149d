"""What d3ssl draws on an image: boxes in their views, regions that are one place in both, images that have no boxes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipeline.store.store import ArtifactStore
from stages.data.tables import SCHEMAS, Table
from stages.pretrain.data.loader import ImageSource, TrainData
from stages.pretrain.views.draw import generator
from stages.pretrain.views.plan import Draw
from tests.conftest import encode, smooth_pixels
from tests.stages.pretrain.methods.test_d3ssl import build, drawn_batch, image_row, settings, sgd_step, some_boxes


def test_boxes_lie_in_their_views_and_moved_ones_inside() -> None:
    config = settings(proposals=4)
    plan = build(proposals=4).view_plan()
    assert plan.drawer is not None
    assert plan.tables == ("boxes",)
    drawer = pickle.loads(pickle.dumps(plan.drawer))  # it travels to the loader's processes
    for image_id in range(60):
        rng = generator(0, 0, 0, image_id)
        extras = drawer(rng, image_row(image_id, some_boxes(rng))).extras
        assert {name: value.shape for name, value in extras.items()} == {
            "boxes": (4, 4, 4),
            "cuts": (3, 8, 4),
            "regions": (2, 8, 4),
            "moved": (4, 4),
            "shift": (2,),
            "whole": (),
        }
        for rois, side in zip(extras["boxes"], (32, 32, 16, 32), strict=True):
            assert (rois >= 0).all()
            assert (rois <= side).all()
            assert (rois[:, 2:] > rois[:, :2]).all()
        assert (extras["moved"] >= 0).all()
        assert (extras["moved"] <= config.size).all()
        origin = extras["moved"] - np.tile(extras["shift"], 2)
        assert (origin >= 0).all()
        assert (origin <= config.size).all()


def test_a_region_is_the_same_place_in_both_views() -> None:
    drawer = build(jitter={"kind": "none"}, flip=0.5).view_plan().drawer
    assert drawer is not None

    def in_image(draw: Draw, rois: np.ndarray) -> np.ndarray:
        corners = np.stack([rois[:, :2], rois[:, 2:]], 1) @ draw.affine[:, :2].T + draw.affine[:, 2]
        return np.concatenate([corners.min(1), corners.max(1)], 1)

    mirrored = 0
    for image_id in range(40):
        rng = generator(0, 0, 0, image_id)
        drawn = drawer(rng, image_row(image_id, some_boxes(rng)))
        one, two = drawn.draws
        mirrored += one.affine[0, 0] * two.affine[0, 0] < 0
        first, second = in_image(one, drawn.extras["boxes"][0]), in_image(two, drawn.extras["boxes"][1])
        shown = in_image(two, np.array([[0.0, 0, 32, 32]]))
        clipped = np.concatenate([np.maximum(first[:, :2], shown[:, :2]), np.minimum(first[:, 2:], shown[:, 2:])], 1)
        np.testing.assert_allclose(second, clipped, atol=1e-3)
        np.testing.assert_allclose(drawn.extras["boxes"][2], drawn.extras["boxes"][1] / 2, atol=1e-4)
    assert mirrored > 5


def test_the_crop_is_drawn_again_until_it_shows_enough_boxes() -> None:
    """Two boxes in opposite corners: crops of 40 % rarely show both, and a second look asks for one only."""
    drawer = build(proposals=4, crop_scale=(0.4, 0.4), min_side=9).view_plan().drawer
    assert drawer is not None
    corners = [[0, 0, 60, 60], [140, 140, 200, 200]]
    seen = []
    for image_id in range(60):
        extras = drawer(generator(0, 0, 0, image_id), image_row(image_id, corners, 200, 200)).extras
        seen.append(bool(extras["whole"]))
    assert not all(seen)
    hidden = [[99, 99, 101, 101]]  # too small in every view
    assert drawer(generator(0, 0, 0, 1), image_row(1, hidden, 200, 200)).extras["whole"]


@pytest.mark.parametrize("boxes", [None, [], [[0, 0, 70, 50]]])
def test_an_image_without_boxes_is_its_own_box(boxes: Any) -> None:
    drawer = build(jitter={"kind": "none"}).view_plan().drawer
    assert drawer is not None
    extras = drawer(generator(0, 0, 0, 0), image_row(0, boxes)).extras
    np.testing.assert_array_equal(extras["boxes"][0], np.tile([0, 0, 32, 32], (3, 1)))
    np.testing.assert_array_equal(extras["boxes"][1], np.tile([0, 0, 32, 32], (3, 1)))
    np.testing.assert_array_equal(extras["shift"], [0, 0])
    assert bool(extras["whole"]) is (not boxes)


def test_images_without_boxes_are_counted_and_trained_on() -> None:
    method = build()
    without, with_boxes = drawn_batch(method.settings, boxes=False), drawn_batch(method.settings, first=8)
    for batch in (without, with_boxes, without):
        values = sgd_step(method, batch)
    assert all(np.isfinite(value) for value in values.values())
    assert method.diagnostics()["images_without_boxes"] == 16


def test_grey_and_tiny_images_train(tmp_path: Path) -> None:
    """Through the real reader: a grey-scale JPEG, images smaller than a view, one that the boxes table lacks."""
    store = ArtifactStore(str(tmp_path))
    grey = encode(Image.fromarray(smooth_pixels(70, 50)).convert("L"))
    files = [(grey, 70, 50), (encode(smooth_pixels(9, 7)), 9, 7), (encode(smooth_pixels(1, 1)), 1, 1)]
    files.append((encode(smooth_pixels(80, 60)), 80, 60))
    rows = [
        dict.fromkeys(SCHEMAS["images"].names)
        | {"image_id": i, "key": f"{i}.jpg", "image": data, "width": width, "height": height}
        for i, (data, width, height) in enumerate(files)
    ]
    found = [{"image_id": 0, "boxes": [[5, 5, 40, 40]]}, {"image_id": 1, "boxes": [[0, 0, 9, 7]]}]
    found.append({"image_id": 2, "boxes": []})

    def table(kind: str, rows: list[dict[str, Any]], fingerprint: str) -> Table:
        writer = store.begin(kind, fingerprint)
        writer.put_table(0, pa.Table.from_pylist(rows, schema=SCHEMAS[kind]))
        return Table.open(writer.commit())

    source = ImageSource(table("images", rows, "0" * 24), boxes=table("boxes", found, "1" * 24))
    method = build()
    data = TrainData([source], method.view_plan(), global_batch=4, seed=0)
    for batch in data.batches(0, 3):
        assert torch.isfinite(batch.views["whole"]).all()
        assert not batch.skipped
        assert all(np.isfinite(value) for value in sgd_step(method, batch).values())
    assert method.diagnostics()["images_without_boxes"] == 6
