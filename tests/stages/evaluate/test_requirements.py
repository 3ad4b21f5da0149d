"""What evaluations refuse before anything is trained, by what the manifest of their images says."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from pipeline.errors import SourceError
from pipeline.stage import Feed, Stage
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data.images import encode_mask
from stages.evaluate.classify_knn import ClassifyKnn
from stages.evaluate.segment_linear import SegmentLinear
from stages.ingest.settings import IngestConfig

from .conftest import RunStage
from .test_segment_linear import SMALL, with_masks

GOOD = {"images": 20, "masks": 20, "labels": 20, "label_classes": 3, "mask_values": [0, 1]}


def asked(stage: type[Stage[Any]], counts: dict[str, int] | None, notes: dict[str, Any] | None) -> list[str]:
    """What the stage has against images with these counts and notes, a line each."""
    feed = Feed("photos", "images", "0" * 24, {}, IngestConfig(source="x"), counts, notes)
    config = stage.Config.model_validate({"images": "photos", "encoder": "e"})
    return [f"{path}: {what} ({remedy})" for path, what, remedy in stage(config).mismatches({"images": feed})]


def contents(**changes: Any) -> dict[str, Any]:
    """Notes of images with two good splits, but for these changes to val."""
    return {"contents": {"train": GOOD, "val": GOOD | changes}, "mask_classes": ["sky", "road"]}


@pytest.mark.parametrize("stage", [ClassifyKnn, SegmentLinear])
def test_nothing_is_known_of_images_that_are_not_made_or_not_by_ingest(stage: type[Stage[Any]]) -> None:
    assert asked(stage, None, None) == []
    assert asked(stage, {}, {}) == []
    assert asked(stage, {"images": 40, "masks": 40, "labels": 40}, contents()) == []


@pytest.mark.parametrize(("stage", "what"), [(ClassifyKnn, "labels"), (SegmentLinear, "masks")])
def test_images_without(stage: type[Stage[Any]], what: str) -> None:
    (line,) = asked(stage, {"images": 40, "masks": 0, "labels": 0}, contents(masks=0, labels=0))
    assert line.startswith(f"images: photos has no {what}: none of its 40 images has a {what[:-1]} (ingest")
    (line,) = asked(stage, {"images": 40, "masks": 20, "labels": 20}, contents(masks=0, labels=0))
    assert line == f"test_split: no image of split 'val' of photos has a {what[:-1]} (splits that have: train)"
    lines = asked(stage, {"images": 40, "masks": 40, "labels": 40}, {"splits": {"train": 40}})
    assert lines[0].startswith("test_split: photos has no image of split 'val' (images by split: train: 40) (name one")


def test_masks_of_one_class() -> None:
    counts = {"images": 40, "masks": 40}
    (line,) = asked(SegmentLinear, counts, contents(mask_values=[1]))
    assert line.startswith("test_split: the masks of split 'val' of photos hold one class only, road (value 1); every")
    (line,) = asked(SegmentLinear, counts, contents(mask_values=[]))
    assert "hold no class: all their pixels are ignored" in line


def test_too_few_train_images_or_classes_to_vote() -> None:
    counts, few = {"images": 40, "labels": 40}, GOOD | {"labels": 19}
    (line,) = asked(ClassifyKnn, counts, {"contents": {"train": few, "val": GOOD}})
    assert line == "k: k is 20, but split 'train' of photos has 19 labelled images that can vote (set it to 19 or less)"
    (line,) = asked(ClassifyKnn, counts, {"contents": {"train": GOOD | {"label_classes": 1}, "val": GOOD}})
    assert line.startswith("train_split: all labelled images of split 'train' of photos are of one class")


@pytest.mark.parametrize(("images", "which"), [(range(20), "train images"), (range(20, 30), "test images")])
def test_one_class_is_found_in_the_pixels_too(
    run: RunStage, store: ArtifactStore, coloured: Artifact, images: range, which: str
) -> None:
    """Images may come from another stage type, whose notes say nothing of their masks."""
    one = dict.fromkeys(images, encode_mask(np.zeros((40, 48), np.uint8)))
    with pytest.raises(SourceError, match=rf"every pixel of the {which} \(\w+\) that counts is of one class, red"):
        run(SegmentLinear, images=with_masks(store, coloured, one), **{**SMALL, "samples": 20})


def test_asking_imports_nothing_heavy() -> None:
    code = (
        "import sys; from stages.ingest.stage import Ingest; from stages.ingest.settings import IngestConfig\n"
        "stage = Ingest(IngestConfig(source='tests', layout='masks', label_map='cityscapes19'))\n"
        "assert list(stage.mismatches({})), 'tests is no source of images'\n"
        "assert not stage.uses_ray\n"
        "assert not {'cv2', 'numpy', 'PIL', 'pyarrow', 'ray', 'torch', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
