"""The `finetune_classification` stage: it learns, resumes exactly, takes a share of labels, refuses what is wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from pipeline.errors import UsageError
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data.units import resample
from stages.finetune.classification import ClassificationConfig, FinetuneClassification
from stages.finetune.classification_work import share_of_labels
from stages.models.encoder import Encoder
from tests.stages.finetune.conftest import ALONE, Tune, curve, write_squares

SETTINGS = {"size": 32, "crop_scale": [0.5, 1.0], "optimizer": {"lr": 3e-3}, **ALONE}


def test_it_learns_colours_and_writes_encoder_head_curves_and_units(tune: Tune, squares: Artifact) -> None:
    outcome, artifact = tune(FinetuneClassification, "c" * 24, {**SETTINGS, "steps": 30})
    assert outcome.metrics["top1"] > 90
    assert outcome.metrics["top5"] == 100
    assert outcome.counts["test"] == 12
    names = {entry.name for entry in artifact.manifest.files}
    assert {"encoder.safetensors", "head.safetensors", "head.json", "curves.parquet", "units.parquet"} <= names
    drawn = resample(artifact, 50, 0)
    assert drawn["top1"].shape == (50,)
    assert pq.read_table(artifact.local("units.parquet"))["unit"].to_pylist() == [f"{i:02d}.png" for i in range(24, 36)]
    assert Encoder.load(artifact)(torch.zeros(1, 3, 32, 32)).map.shape == (1, 24, 4, 4)
    assert artifact.manifest.kind == "encoder"


def test_a_training_cut_short_goes_on_to_the_same_encoder(tune: Tune) -> None:
    class Killed(Exception):
        pass

    def kill(metrics: Mapping[str, float], step: int) -> None:
        if step == 5:
            raise Killed

    settings = {**SETTINGS, "steps": 8, "checkpoint_every": 2, "layer_decay": 0.7, "colour_jitter": 0.3}
    _, whole = tune(FinetuneClassification, "d" * 24, settings)
    with pytest.raises(Killed):
        tune(FinetuneClassification, "e" * 24, settings, on_row=kill)
    _, cut = tune(FinetuneClassification, "e" * 24, settings)
    assert curve(cut) == curve(whole)
    for file in ("encoder.safetensors", "head.safetensors"):
        again = load_file(cut.local(file))
        assert all(torch.equal(value, again[name]) for name, value in load_file(whole.local(file)).items())
    assert cut.read("metrics.json") == whole.read("metrics.json")


@pytest.mark.chaos
def test_two_workers_one_killed_end_where_whole_ones_do(tune: Tune, ray_local: None) -> None:
    settings = {**SETTINGS, "steps": 16, "checkpoint_every": 4, "resources": {"workers": 2, "cpus": 0.5}}
    _, whole = tune(FinetuneClassification, "d" * 24, settings)
    killed: list[int] = []

    def kill_once(metrics: Mapping[str, float], step: int) -> None:
        if step >= 6 and not killed:
            killed.append(next(pid for pid, name in children() if "TrainWorker" in name))
            os.kill(killed[0], signal.SIGKILL)

    _, cut = tune(FinetuneClassification, "e" * 24, settings, on_row=kill_once)
    assert killed
    assert curve(cut) == curve(whole)
    assert curve(cut)[-1][0] == 16


def children() -> list[tuple[int, str]]:
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found.append((child.pid, " ".join(child.cmdline()[:1])))
    return found


def test_images_that_cannot_be_read_are_replaced_and_named(tune: Tune, store: ArtifactStore) -> None:
    damaged = write_squares(store, "6" * 24, unreadable=(3, 30))
    outcome, _ = tune(FinetuneClassification, "c" * 24, {**SETTINGS, "epochs": 2}, images=damaged)
    assert {problem["key"] for problem in outcome.problems} == {"03.png", "30.png"}
    assert outcome.counts["skipped: unusable image"] >= 2
    assert outcome.counts["test"] == 11


def test_a_share_of_labels_holds_every_class_and_a_smaller_share_is_part_of_it() -> None:
    labels = {i: i % 3 for i in range(300)}
    ten, one = set(share_of_labels(labels, 0.1, 0)), set(share_of_labels(labels, 0.01, 0))
    assert Counter(labels[i] for i in ten) == {0: 10, 1: 10, 2: 10}
    assert Counter(labels[i] for i in one) == {0: 1, 1: 1, 2: 1}
    assert one < ten
    assert ten != set(share_of_labels(labels, 0.1, 1))
    assert len(share_of_labels(labels, 1.0, 0)) == 300


def test_layers_below_learn_slower(vit: Artifact) -> None:
    from stages.finetune.classification_work import Classifier
    from stages.training.optim import build_optimizer
    from stages.training.settings import OptimizerSettings

    config = ClassificationConfig.model_validate({"images": "i", "encoder": "e", "steps": 1, "layer_decay": 0.5})
    model = Classifier(Encoder.load(vit), 3, config)
    shares = {name: model.share_of_lr(name) for name, _ in model.named_parameters()}
    assert shares["trunk.model.patch_embed.proj.weight"] == 0.5**3
    assert shares["trunk.model.blocks.0.mlp.fc1.weight"] == 0.5**2
    assert shares["trunk.model.blocks.1.mlp.fc1.weight"] == 0.5
    assert shares["head.weight"] == 1
    groups = build_optimizer(model, OptimizerSettings(weight_decay=0.1)).param_groups
    assert {group["share_of_lr"] for group in groups} == {1.0, 0.5, 0.25, 0.125}
    undecayed = [parameter for group in groups if not group["weight_decay"] for parameter in group["params"]]
    assert any(parameter is model.trunk.model.pos_embed for parameter in undecayed)


def test_frozen_batch_norms_stay_as_they_are(tune: Tune, resnet: Artifact) -> None:
    _, artifact = tune(
        FinetuneClassification, "c" * 24, {**SETTINGS, "steps": 2, "batch_norm": "freeze"}, encoder=resnet
    )
    before, after = (load_file(one.local("encoder.safetensors")) for one in (resnet, artifact))
    assert torch.equal(before["bn1.running_mean"], after["bn1.running_mean"])
    assert torch.equal(before["bn1.weight"], after["bn1.weight"])
    assert not torch.equal(before["conv1.weight"], after["conv1.weight"])


def refused(config: dict[str, Any], **notes: Any) -> list[str]:
    stage = FinetuneClassification(ClassificationConfig.model_validate({"images": "i", "encoder": "e", **config}))
    images = SimpleNamespace(stage="photos", counts={"labels": 300, "images": 300}, notes=notes)
    backbone = SimpleNamespace(backbone=None)
    encoder = SimpleNamespace(config=backbone, inputs={})
    feeds: Any = {"images": images, "encoder": encoder}
    return [f"{path}: {what}" for path, what, _ in stage.mismatches(feeds)]


def test_a_plan_refuses_what_cannot_be_trained() -> None:
    contents = {"train": {"images": 300, "labels": 300}, "val": {"images": 60, "labels": 0}}
    assert refused({"steps": 1, "batch_size": 64, "test_split": "train"}, contents=contents) == []
    assert refused({"steps": 1, "batch_size": 64}, contents=contents) == [
        "test_split: no image of split 'val' of photos has a label"
    ]
    few = {"steps": 1, "batch_size": 64, "label_fraction": 0.1, "test_split": "train"}
    (line,) = refused(few, contents=contents)
    assert line.startswith("batch_size: a step takes 64 images, and there are 30 to learn from")
    (line,) = refused({"steps": 1, "batch_size": 4, "resources": {"workers": 3}})
    assert line == "batch_size: a forward pass has 4 images, which 3 workers cannot share equally"


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"crop_scale": [0.5, 0.2]}, r"crop_scale \[0.5, 0.2\] must rise"),
        ({"size": 96, "test_resize": 64}, "test_resize: 64 is less than size 96"),
        ({"label_fraction": 0}, "greater than 0"),
        ({"optimizer": {"lr_drops": [0.5], "lr_power": 1}}, "lr_drops, lr_power"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        ClassificationConfig.model_validate({"images": "i", "encoder": "e", "epochs": 1, **settings})


def test_workers_that_cannot_share_a_batch_are_refused_at_the_start() -> None:
    from stages.finetune.fit import check_start

    config = ClassificationConfig.model_validate({"images": "i", "encoder": "e", "steps": 1, "batch_size": 4})
    context: Any = SimpleNamespace(name="tuned")
    check_start(config, context, (1, 2))
    with pytest.raises(UsageError, match=r"stages\.tuned\.batch_size: a forward pass has 4 images, which 3 workers"):
        check_start(config, context, (1, 3))


def test_planning_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from stages.finetune.classification import FinetuneClassification; "
        "print([m for m in ('torch', 'ray', 'cv2', 'pyarrow', 'timm', 'mlflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
