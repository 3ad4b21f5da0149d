"""Bbox-aligned k-NN as a stage: the tokens of the box decide, not those around it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import SourceError, UsageError
from pipeline.stage import Feed
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data.tables import SCHEMAS
from stages.embeddings.settings import FeaturesConfig
from stages.evaluate.classify_boxes import ClassifyBoxes, ClassifyBoxesConfig
from tests.conftest import encode
from tests.stages.evaluate.conftest import RunStage

SIDE = 7  # patches of the central crop


@pytest.fixture
def boxed(store: ArtifactStore) -> tuple[Artifact, Artifact]:
    """12 square images of two classes; only the patches in the box say which. The last has its box in a corner."""
    rows, maps = [], []
    for i in range(13):
        label = i % 2
        box = [48.0, 48.0, 80.0, 80.0] if i < 12 else [0.0, 0.0, 4.0, 4.0]
        thing = {"box": box, "category": str(label), "category_id": label, "crowd": False, "mask": None}
        row: dict[str, Any] = dict.fromkeys(SCHEMAS["images"].names)
        row |= {"image_id": i, "key": f"{i}.png", "width": 128, "height": 128, "objects": [thing], "sha256": ""}
        row |= {"image": encode(np.zeros((128, 128, 3), np.uint8), "PNG"), "label": str(label), "label_id": label}
        rows.append(row | {"split": "train" if i < 8 else "val"})
        patches = np.random.default_rng(i).normal(size=(SIDE, SIDE, 4)).astype(np.float16)
        patches[2:5, 2:5] = np.eye(4, dtype=np.float16)[label]  # 40 to 72 of the crop's 112 pixels
        values = {"patches": patches.ravel(), "vector": patches.mean(axis=(0, 1))}
        maps.append({"image_id": i, "key": f"{i}.png", "grid_height": SIDE, "grid_width": SIDE, **values})
    images = store.begin("images", "boxed")
    images.put_table(0, pa.Table.from_pylist(rows, schema=SCHEMAS["images"]))
    features = store.begin("features", "boxed")
    features.put_table(0, pa.Table.from_pylist(maps, schema=SCHEMAS["features"]))
    return images.commit(notes={"classes": ["0", "1"]}), features.commit()


def test_the_patches_of_the_box_vote(run_frozen: RunStage, boxed: tuple[Artifact, Artifact]) -> None:
    images, features = boxed
    outcome, _ = run_frozen(ClassifyBoxes, images=images, given=features, k=9)
    assert outcome.metrics["top1"] == 100
    assert outcome.counts == {"train": 8, "test": 4, "unusable": 1}
    assert outcome.problems == [{"key": "12.png", "reason": "it has no box in the central crop"}]


def test_more_neighbours_than_tokens_are_refused(run_frozen: RunStage, boxed: tuple[Artifact, Artifact]) -> None:
    images, features = boxed
    with pytest.raises(UsageError, match=r"stages\.eval\.k: 140, but there are 72 train tokens"):
        run_frozen(ClassifyBoxes, images=images, given=features)


def test_images_without_boxes_are_refused(run_frozen: RunStage) -> None:
    with pytest.raises(SourceError, match="has a label, a box in its middle and features"):
        run_frozen(ClassifyBoxes)


def test_features_of_whole_images_are_refused_when_planning() -> None:
    config = ClassifyBoxesConfig.model_validate({"images": "i", "features": "f"})
    whole = FeaturesConfig.model_validate({"images": "i", "encoder": "e"})
    images = Feed("i", "images", "1", {}, config)
    features = Feed("f", "features", "2", {"images": images}, whole)
    [(path, _, remedy)] = ClassifyBoxes(config).mismatches({"images": images, "features": features})
    assert (path, remedy) == ("features", "name features with fit: centre")
