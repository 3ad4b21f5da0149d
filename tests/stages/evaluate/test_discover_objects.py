"""Object discovery: a bright square on a plain ground is found; the stage scores it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.errors import SourceError
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data.tables import SCHEMAS
from stages.evaluate.discover_objects import DiscoverObjects
from stages.evaluate.seed_expansion import discover
from tests.conftest import encode
from tests.stages.evaluate.conftest import RunStage


def scene(top: int, left: int, side: int = 3) -> torch.Tensor:
    """A map of 8x10 patches: the object's features point one way, the ground's another."""
    generator = torch.Generator().manual_seed(top * 10 + left)
    found = torch.tensor([1.0, -0.5, 0.0]).repeat(8, 10, 1)
    found[top : top + side, left : left + side] = torch.tensor([-0.5, 1.0, 0.2])
    return found + 0.05 * torch.randn(8, 10, 3, generator=generator)


@pytest.mark.parametrize(("top", "left"), [(0, 0), (2, 5), (5, 7)])
def test_the_small_region_is_the_object(top: int, left: int) -> None:
    assert discover(scene(top, left)) == (left, top, left + 3, top + 3)


def test_what_hangs_apart_is_left_out() -> None:
    both = scene(0, 0, 2)
    both[6:8, 8:10] = both[0:2, 0:2]
    x0, y0, x1, y1 = discover(both)
    assert (x1 - x0, y1 - y0) == (2, 2)


@pytest.fixture
def boxed(store: ArtifactStore) -> tuple[Artifact, Artifact]:
    """Three images with a box of 24 pixels, one with a crowd only, and their features."""
    rows, maps = [], []
    for i, (top, left) in enumerate([(0, 0), (2, 5), (5, 7), (1, 1)]):
        row: dict[str, Any] = dict.fromkeys(SCHEMAS["images"].names)
        box = [8.0 * left, 8.0 * top, 8.0 * left + 24, 8.0 * top + 24]
        thing = {"box": box, "category": "thing", "category_id": 0, "crowd": i == 3, "mask": None}
        row |= {"image_id": i, "key": f"{i}.png", "width": 80, "height": 64, "objects": [thing], "split": "val"}
        rows.append(row | {"image": encode(np.zeros((64, 80, 3), np.uint8), "PNG"), "sha256": ""})
        patches = scene(*((top, left) if i else (4, 4))).numpy().astype(np.float16)  # the first is found elsewhere
        values = {"patches": patches.ravel(), "vector": patches.mean(axis=(0, 1))}
        maps.append({"image_id": i, "key": f"{i}.png", "grid_height": 8, "grid_width": 10, **values})
    images = store.begin("images", "boxed")
    images.put_table(0, pa.Table.from_pylist(rows, schema=SCHEMAS["images"]))
    features = store.begin("features", "boxed")
    features.put_table(0, pa.Table.from_pylist(maps, schema=SCHEMAS["features"]))
    return images.commit(), features.commit()


def test_corloc_counts_the_images_whose_box_fits(run_frozen: RunStage, boxed: tuple[Artifact, Artifact]) -> None:
    images, features = boxed
    outcome, artifact = run_frozen(DiscoverObjects, images=images, given=features)
    assert outcome.metrics["corloc"] == pytest.approx(200 / 3)
    assert outcome.counts["images"] == 3
    assert artifact.read("preview.png").startswith(b"\x89PNG")


def test_images_without_boxes_are_refused(run_frozen: RunStage) -> None:
    with pytest.raises(SourceError, match="no image has object boxes and features"):
        run_frozen(DiscoverObjects)
