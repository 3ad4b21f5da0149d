"""The `finetune_detection` stage: each detector trains and is tested, resumes exactly, and finds squares in the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from pipeline.errors import SourceError
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data.images import decode
from stages.data.rows import iter_rows
from stages.finetune.detection import DetectionConfig, FinetuneDetection
from stages.finetune.detection_work import SizedWithObjects, fitted, place
from stages.models.settings import Backbone
from tests.stages.finetune.conftest import ALONE, Tune, curve

SMALL = {
    "short": [64, 64],
    "long": 128,
    "test_short": 64,
    "test_long": 128,
    "anchors": [8, 16, 32, 48, 64],
    "optimizer": {"name": "adamw", "lr": 1e-3},
    "batch_size": 2,
    "proposals": 60,
    "regions": 32,
    "detections": 6,
    **ALONE,
}
OF_HEAD = ("loss_classifier", "loss_box_reg")
OF_BOXES = {"loss_objectness", "loss_rpn_box_reg", *OF_HEAD}
KINDS = {
    "mask_fpn": ({"masks": True}, "resnet"),
    "faster_other": ({}, "mobilenet"),
    "faster_c4": ({"neck": "c4", "anchors": [16, 32]}, "resnet"),
    "mask_c4": ({"neck": "c4", "masks": True, "anchors": [16, 32, 64]}, "resnet"),
    "mask_simple": ({"masks": True, "square": 64, "scale": [0.5, 2.0], "layer_decay": 0.7}, "vit"),
    "cascade_mask": ({"cascade": True, "masks": True}, "resnet"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_detector_trains_and_is_tested(tune: Tune, kind: str, request: pytest.FixtureRequest) -> None:
    changes, encoder = KINDS[kind]
    given = request.getfixturevalue(encoder)
    outcome, artifact = tune(FinetuneDetection, "c" * 24, {**SMALL, **changes, "steps": 2}, encoder=given)
    names = ["ap", "ap50", "ap75"] + (["ap_mask", "ap50_mask", "ap75_mask"] if changes.get("masks") else [])
    assert set(outcome.metrics) == {*names, "loss"}
    assert outcome.counts["test"] == 12
    row = json.loads(artifact.read("curves.json"))[-1]
    weights = dict.fromkeys(OF_BOXES, 1.0) | ({"loss_mask": 1.0} if changes.get("masks") else {})
    if changes.get("cascade"):
        heads = {f"{name}_{i}": 0.5 ** (i - 1) for name in OF_HEAD for i in (1, 2, 3)}
        weights = {name: 1.0 for name in weights if name not in OF_HEAD} | heads
    assert row["total"] == pytest.approx(sum(weight * row[name] for name, weight in weights.items()), rel=1e-4)
    drawn = FinetuneDetection.resampled(artifact, 20, 0)
    assert set(drawn) == set(names)
    assert drawn["ap"].shape == (20,)
    before, after = (load_file(one.local("encoder.safetensors")) for one in (given, artifact))
    assert any(not torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.chaos  # kills nothing, but takes most of a minute
def test_it_finds_squares(tune: Tune, resnet: Artifact) -> None:
    outcome, _ = tune(FinetuneDetection, "c" * 24, {**SMALL, "batch_size": 4, "steps": 60}, encoder=resnet)
    assert outcome.metrics["ap50"] > 20


def test_a_training_cut_short_goes_on_to_the_same_detector(tune: Tune, resnet: Artifact) -> None:
    class Killed(Exception):
        pass

    def kill(metrics: Mapping[str, float], step: int) -> None:
        if step == 3:
            raise Killed

    changes = {"neck": "c4", "anchors": [16, 32], "masks": True}
    settings = {**SMALL, **changes, "steps": 4, "checkpoint_every": 2}
    _, whole = tune(FinetuneDetection, "d" * 24, settings, encoder=resnet)
    with pytest.raises(Killed):
        tune(FinetuneDetection, "e" * 24, settings, encoder=resnet, on_row=kill)
    _, cut = tune(FinetuneDetection, "e" * 24, settings, encoder=resnet)
    assert curve(cut) == curve(whole)
    assert cut.read("metrics.json") == whole.read("metrics.json")


def configured(**changes: Any) -> DetectionConfig:
    return DetectionConfig.model_validate({"images": "i", "encoder": "e", "steps": 1, **changes})


def test_boxes_and_masks_follow_the_image(squares: Artifact) -> None:
    config = configured(masks=True, square=96, scale=[0.5, 1.5], flip=0.5)
    for row in list(iter_rows(squares, ["image", "objects"]))[:8]:
        for seed in range(4):
            example = SizedWithObjects(config)(row, decode(row["image"]), np.random.default_rng(seed))
            assert example.pixels.shape == (96, 96, 3)
            for box, mask in zip(example.targets["boxes"], example.targets["masks"], strict=True):
                ys, xs = np.nonzero(mask)
                edges = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
                assert np.abs(edges - box).max() <= 1.5


def test_sides_keep_the_limits() -> None:
    assert fitted(640, 480, 800, 1333) == (1067, 800)
    assert fitted(1000, 250, 800, 1333) == (1333, 333)
    drawn = {min(place(np.random.default_rng(i), 640, 480, configured()).size) for i in range(200)}
    assert drawn == set(range(480, 801, 32))


def test_images_without_any_box_are_refused(tune: Tune, store: ArtifactStore, squares: Artifact) -> None:
    import pyarrow as pa

    from stages.data.tables import SCHEMAS

    rows = [{**row, "objects": []} for row in iter_rows(squares, SCHEMAS["images"].names)]
    writer = store.begin("images", "7" * 24)
    writer.put_table(0, pa.Table.from_pylist(rows, schema=SCHEMAS["images"]))
    empty = writer.commit(notes={"classes": ["red"]})
    with pytest.raises(SourceError, match=r"no image of split 'train' of .* has a box"):
        tune(FinetuneDetection, "c" * 24, {**SMALL, "steps": 1}, images=empty)


def refused(name: str, **changes: Any) -> list[str]:
    stage = FinetuneDetection(configured(batch_size=2, **changes))
    contents = {split: {"images": 9, "objects": 9} for split in ("train", "val")}
    images = SimpleNamespace(stage="photos", counts={"objects": 18, "images": 18}, notes={"contents": contents})
    encoder = SimpleNamespace(config=SimpleNamespace(backbone=Backbone(name=name)), inputs={})
    feeds: Any = {"images": images, "encoder": encoder}
    return [f"{path}: {what}" for path, what, _ in stage.mismatches(feeds)]


def test_a_plan_refuses_a_neck_that_does_not_fit() -> None:
    assert refused("resnet18") == []
    assert refused("vit_small_patch16_224", square=224) == []
    assert refused("vit_small_patch16_224", neck="c4") == [
        "neck: c4 is for ResNets, and vit_small_patch16_224 is a ViT"
    ]
    assert refused("resnet18", neck="simple") == ["neck: simple is for ViTs, and resnet18 is none"]
    (line,) = refused("vit_small_patch16_224", square=100)
    assert line.startswith("square: 100 pixels do not split into patches of 16")


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"short": [800, 480]}, "short .* must be positive and rise"),
        ({"long": 300}, "may not be less than the short side"),
        ({"anchors": [32, 64]}, "one for each of five levels"),
        ({"neck": "c4", "cascade": True}, "its heads read a pyramid"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        configured(**settings)
