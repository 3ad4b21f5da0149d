"""The `finetune_segmentation` stage: every decoder learns, on every kind of encoder; it resumes and scores exactly."""

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
from torchmetrics.classification import MulticlassJaccardIndex

from pipeline.store.artifact import Artifact
from stages.data.images import decode, decode_mask
from stages.data.rows import iter_rows
from stages.data.units import resample
from stages.finetune.segmentation import FinetuneSegmentation, SegmentationConfig
from stages.finetune.segmentation_work import Segmenter, predict
from stages.models.encoder import Encoder
from tests.stages.finetune.conftest import ALONE, Tune, curve

SMALL = {"size": 32, "scale": [1.0, 1.5], "optimizer": {"lr": 5e-3}, "max_class_share": 1.0, **ALONE}
DECODERS = {"linear": {}, "fpn": {"width": 16}, "upernet": {"width": 16}}


@pytest.mark.parametrize("decoder", DECODERS)
def test_each_decoder_learns(tune: Tune, vit: Artifact, resnet: Artifact, decoder: str) -> None:
    settings = {**SMALL, "decoder": decoder, **DECODERS[decoder], "steps": 40, "dropout": 0.0}
    encoder = vit if decoder == "linear" else resnet  # a crop is one cell of the ResNet's own map
    outcome, artifact = tune(FinetuneSegmentation, "c" * 24, settings, encoder=encoder)
    # 25 is what one class for all pixels could reach at most: of four classes, one right.
    assert outcome.metrics["miou"] > 35
    assert resample(artifact, 20, 0)["miou"].shape == (20,)
    assert {"head.safetensors", "encoder.safetensors", "preview.png"} <= {e.name for e in artifact.manifest.files}


@pytest.mark.parametrize("decoder", DECODERS)
def test_each_decoder_reads_a_vit(tune: Tune, vit: Artifact, decoder: str) -> None:
    settings = {**SMALL, "decoder": decoder, **DECODERS[decoder], "steps": 2, "layer_decay": 0.8}
    outcome, artifact = tune(FinetuneSegmentation, "c" * 24, settings, encoder=vit)
    assert 0 <= outcome.metrics["miou"] <= 100
    terms = {"cross_entropy", "auxiliary"} if decoder == "upernet" else {"cross_entropy"}
    row = json.loads(artifact.read("curves.json"))[-1]
    assert {name for name in ("cross_entropy", "auxiliary") if name in row} == terms
    expected = row["cross_entropy"] + 0.4 * row.get("auxiliary", 0.0)
    assert row["total"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("decoder", ["fpn", "upernet"])
def test_each_decoder_reads_other_networks(tune: Tune, mobilenet: Artifact, decoder: str) -> None:
    settings = {**SMALL, "decoder": decoder, **DECODERS[decoder], "steps": 2}
    outcome, _ = tune(FinetuneSegmentation, "c" * 24, settings, encoder=mobilenet)
    assert 0 <= outcome.metrics["miou"] <= 100


def test_a_training_cut_short_goes_on_to_the_same_decoder(tune: Tune, resnet: Artifact) -> None:
    class Killed(Exception):
        pass

    def kill(metrics: Mapping[str, float], step: int) -> None:
        if step == 3:
            raise Killed

    settings = {**SMALL, "decoder": "upernet", "width": 8, "steps": 5, "checkpoint_every": 2}
    _, whole = tune(FinetuneSegmentation, "d" * 24, settings, encoder=resnet)
    with pytest.raises(Killed):
        tune(FinetuneSegmentation, "e" * 24, settings, encoder=resnet, on_row=kill)
    _, cut = tune(FinetuneSegmentation, "e" * 24, settings, encoder=resnet)
    assert curve(cut) == curve(whole)
    again = load_file(cut.local("head.safetensors"))
    assert all(torch.equal(value, again[name]) for name, value in load_file(whole.local("head.safetensors")).items())


def test_the_score_is_that_of_torchmetrics(tune: Tune, squares: Artifact, resnet: Artifact) -> None:
    settings = {**SMALL, "steps": 10, "test": "whole"}
    outcome, artifact = tune(FinetuneSegmentation, "c" * 24, settings, encoder=resnet)
    config = SegmentationConfig.model_validate({"images": "i", "encoder": "e", **settings})
    model = Segmenter(Encoder.load(artifact), 4, config)
    model.load_state_dict(load_file(artifact.local("head.safetensors")), strict=False)
    model.eval()
    seen, truth = [], []
    for row in iter_rows(squares, ["split", "image", "mask"]):
        if row["split"] == "val":
            seen.append(predict(model, decode(row["image"]), config, torch.device("cpu")))
            truth.append(decode_mask(row["mask"]))
    metric = MulticlassJaccardIndex(4, average="macro", ignore_index=255)
    expected = metric(torch.from_numpy(np.stack(seen)), torch.from_numpy(np.stack(truth).astype(np.int64)))
    assert outcome.metrics["miou"] == pytest.approx(100 * float(expected), abs=1e-3)


def test_sliding_over_an_image_of_one_window_is_the_image_at_once(squares: Artifact, resnet: Artifact) -> None:
    torch.manual_seed(0)
    model: Any = None
    seen = {}
    for test in ("slide", "whole"):
        config = SegmentationConfig.model_validate(
            {"images": "i", "encoder": "e", "steps": 1, "size": 48, "test": test}
        )
        model = model or Segmenter(Encoder.load(resnet), 4, config).eval()
        square = np.random.default_rng(0).integers(0, 255, (48, 48, 3)).astype(np.uint8)
        seen[test] = predict(model, square, config, torch.device("cpu"))
    assert np.array_equal(seen["slide"], seen["whole"])


def test_a_crop_without_any_class_costs_nothing() -> None:
    from stages.finetune.segmentation_work import _cross_entropy

    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = _cross_entropy(logits, torch.full((2, 8, 8), -1))
    assert loss.item() == 0
    loss.backward()
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"scale": [2.0, 0.5]}, "must be positive and rise"),
        ({"taps": [1, 2, 3, 4]}, "fpn and upernet read four maps"),
        ({"decoder": "fpn", "taps": [1, 2]}, "read four maps"),
        ({"width": 64}, "a linear decoder has none"),
        ({"test_stride": 600}, "leaves pixels between windows of 512"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        SegmentationConfig.model_validate({"images": "i", "encoder": "e", "steps": 1, **settings})


def test_a_plan_refuses_masks_of_one_class_and_sizes_of_no_whole_patches() -> None:
    from stages.models.settings import Backbone

    config = {"images": "i", "encoder": "e", "steps": 1, "batch_size": 4, "size": 100}
    stage = FinetuneSegmentation(SegmentationConfig.model_validate(config))
    split = {"images": 9, "masks": 9, "mask_values": [1]}
    notes = {"contents": {"train": split, "val": {**split, "mask_values": [0, 1]}}, "mask_classes": ["a", "b"]}
    encoder = SimpleNamespace(config=SimpleNamespace(backbone=Backbone(name="vit_small_patch16_224")), inputs={})
    feeds: Any = {"images": SimpleNamespace(stage="photos", counts={"masks": 9}, notes=notes), "encoder": encoder}
    found = [f"{path}: {what}" for path, what, _ in stage.mismatches(feeds)]
    assert len(found) == 2
    assert found[0].startswith("size: 100 pixels do not split into patches of 16")
    assert "the masks of split 'train' of photos hold one class only" in found[1]
