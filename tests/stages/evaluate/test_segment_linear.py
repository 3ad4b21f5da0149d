"""The linear segmentation stage on images whose class is a colour: scores, files, repeatability, bad input."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError

from pipeline.errors import SourceError, UsageError
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data.images import encode_mask
from stages.data.rows import read_shard
from stages.data.tables import SCHEMAS
from stages.evaluate.segment_linear import SegmentLinear
from stages.evaluate.segment_linear_settings import SegmentLinearConfig
from stages.evaluate.segment_linear_views import draw_crop
from stages.evaluate.segmentation_decoders import draws, enlarging, fit

from .conftest import VOID, RunStage

SMALL = {"train_size": 32, "test_size": 32, "label_size": 8, "samples": 1200, "batch_size": 10, "lr": 0.03}


def test_scores_table_and_picture(run: RunStage) -> None:
    outcome, made = run(SegmentLinear, **SMALL)
    assert outcome.metrics["miou"] > 60, "colours are linear in any features"
    assert {"miou_random", "pixel_accuracy_random", "mean_accuracy_random"} < set(outcome.metrics)
    assert outcome.counts == {"train": 20, "test": 10, "classes": 3, "unreadable": 0}
    table = read_shard(made, next(made.shards())).to_pydict()
    assert table["class"] == ["red", "green", "blue"], "void is no class"
    assert sum(table["pixels"]) == 10 * 40 * (48 - 2), "every test pixel but the void ones, at the masks' own size"
    assert np.mean(table["iou"]) == pytest.approx(outcome.metrics["miou"])
    assert json.loads(made.read("metrics.json"))["miou"] == outcome.metrics["miou"]
    assert made.read("preview.png").startswith(b"\x89PNG")


def test_the_same_config_gives_the_same_numbers(run: RunStage) -> None:
    few = {**SMALL, "samples": 20, "lr": 0.001}
    first, _ = run(SegmentLinear, **few)
    second, _ = run(SegmentLinear, fingerprint="m2", **few)
    other, _ = run(SegmentLinear, fingerprint="m3", **{**few, "seed": 1})
    assert first.metrics == second.metrics
    assert first.metrics["miou"] != other.metrics["miou"]


def test_a_list_of_learning_rates_is_searched_on_train_images(run: RunStage) -> None:
    few = {**SMALL, "samples": 300, "random_baseline": False}
    searched, _ = run(SegmentLinear, **{**few, "lr": [1e-6, 0.03]})
    alone, _ = run(SegmentLinear, fingerprint="m2", **few)
    assert searched.notes == {"lr": 0.03}
    assert searched.metrics == alone.metrics, "the chosen rate is trained again on all train images"


def with_masks(store: ArtifactStore, images: Artifact, masks: dict[int, bytes | None]) -> Artifact:
    rows = [row for entry in images.shards() for row in read_shard(images, entry).to_pylist()]
    for row in rows:
        row["mask"] = masks.get(row["image_id"], row["mask"])
    writer = store.begin("images", "othermasks")
    writer.put_table(0, pa.Table.from_pylist(rows, schema=SCHEMAS["images"]))
    return writer.commit(notes=images.manifest.notes)


def test_masks_of_another_size_or_value_are_named(run: RunStage, store: ArtifactStore, coloured: Artifact) -> None:
    wrong = {2: encode_mask(np.zeros((40, 47), np.uint8)), 25: encode_mask(np.full((40, 48), 9, np.uint8))}
    outcome, _ = run(SegmentLinear, images=with_masks(store, coloured, wrong), **{**SMALL, "samples": 50})
    assert {problem["key"]: problem["reason"] for problem in outcome.problems} == {
        "02.png": "its mask is 47x40, the image 48x40",
        "25.png": "its mask has the value 9, which is no class",
    }


def test_a_train_image_of_void_alone_does_no_harm(run: RunStage, store: ArtifactStore, coloured: Artifact) -> None:
    void = {i: encode_mask(np.full((40, 48), VOID, np.uint8)) for i in range(10)}
    settings = {**SMALL, "samples": 100, "batch_size": 1}
    outcome, _ = run(SegmentLinear, images=with_masks(store, coloured, void), **settings)
    assert all(math.isfinite(value) for value in outcome.metrics.values())


def test_a_split_without_masks_is_an_error(run: RunStage, store: ArtifactStore, coloured: Artifact) -> None:
    bare = with_masks(store, coloured, dict.fromkeys(range(20)))
    with pytest.raises(
        SourceError, match=r"no image of split 'train' .* has a mask .* ingest with a layout that has masks"
    ):
        run(SegmentLinear, images=bare, **SMALL)


def test_test_images_of_void_alone_are_an_error(run: RunStage, store: ArtifactStore, coloured: Artifact) -> None:
    void = {i: encode_mask(np.full((40, 48), VOID, np.uint8)) for i in range(20, 30)}
    with pytest.raises(SourceError, match=r"no pixel of the 10 test images has a class.*check ignore_index \(3\)"):
        run(SegmentLinear, images=with_masks(store, coloured, void), **{**SMALL, "samples": 20})


def test_a_size_that_is_no_multiple_of_the_patch_names_the_key(run: RunStage) -> None:
    with pytest.raises(UsageError, match=r"stages\.eval\.test_size: 30 pixels do not split into patches of 8"):
        run(SegmentLinear, **{**SMALL, "test_size": 30})


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"crop_scale": (0.9, 0.8)}, r"crop_scale \[0\.9, 0\.8\] must rise within \(0, 1\]"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"lr": []}, r"lr \[\] must be a positive number, or a list of them"),
        ({"lr": [0.1, 0.0]}, "lr"),
        ({"lr": -1.0}, "lr"),
        ({"zoom": (2.0, 0.5)}, r"zoom \[2\.0, 0\.5\] must rise"),
        ({"zoom": (0.5, 2.0), "crops": 0}, "zoom is of random crops, and crops is 0"),
        ({"slide": 449}, "slide 449 leaves gaps between windows of test_size 448"),
    ],
)
def test_rules_of_the_settings(settings: dict[str, object], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        SegmentLinearConfig.model_validate({"images": "i", "encoder": "e", **settings})


def test_the_linear_layer_solves_what_is_linear() -> None:
    """Each cell's class is the largest of its first K channels: a 1x1 convolution must find that."""
    generator = np.random.default_rng(0)
    maps = generator.normal(size=(40, 6, 4, 4)).astype(np.float16)
    labels = maps[:, :3].argmax(axis=1).astype(np.int16)
    config = SegmentLinearConfig(images="i", encoder="e", samples=8000, batch_size=20)
    probe = fit(maps, labels, np.arange(40), 3, lr=0.05, config=config, device=torch.device("cpu"))
    found = np.stack([probe.predict(torch.from_numpy(one).float(), 4, 4) for one in maps])
    assert (found == labels).mean() > 0.97


def test_crops_stay_inside_and_keep_their_share() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        top, left, height, width = draw_crop(generator, 30, 50, (0.5, 0.6))
        assert 0 <= top <= 30 - height
        assert 0 <= left <= 50 - width
        assert 0.4 < height * width / 1500 < 0.65


def test_enlarging_by_matrices_is_bilinear_interpolation() -> None:
    small = torch.randn(2, 3, 5, 7)
    slow = torch.nn.functional.interpolate(small, (16, 16), mode="bilinear")
    torch.testing.assert_close(enlarging(5, 16) @ small @ enlarging(7, 16).T, slow, atol=1e-5, rtol=1e-5)


def test_draws_are_whole_shuffled_epochs_up_to_the_sample() -> None:
    batches = [batch.tolist() for batch in draws(np.arange(3, 10), 17, 4, seed=0)]
    assert [len(batch) for batch in batches] == [4, 3, 4, 3, 3]
    assert sorted(batches[0] + batches[1]) == sorted(batches[2] + batches[3]) == list(range(3, 10))
    assert batches[0] != batches[2]
