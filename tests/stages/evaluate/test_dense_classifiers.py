"""CAPI's dense k-NN and logistic regression: the stages on coloured images, parts against slow counts, bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.errors import SourceError, UsageError
from pipeline.stage import Context, Resources
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data.confusion import confusion, scores
from stages.data.images import encode_mask
from stages.data.units import resample
from stages.evaluate.held_out import held_out
from stages.evaluate.in_context import CELL
from stages.evaluate.patch_labels import Patches, class_pixels, enlarged, scale
from stages.evaluate.patch_neighbors import LabelledNeighbors, majority
from stages.evaluate.segment_knn import SegmentKnn, SegmentKnnConfig
from stages.evaluate.segment_logistic import SegmentLogistic, SegmentLogisticConfig

from .conftest import RunStage
from .test_segment_linear import with_masks

STAGES: list[tuple[type[Any], dict[str, Any]]] = [(SegmentKnn, {"k": [1, 5]}), (SegmentLogistic, {"c": [1e-6, 1.0]})]


@pytest.mark.parametrize(("stage", "settings"), STAGES)
def test_patches_of_a_colour_are_told_apart(run_frozen: RunStage, stage: type[Any], settings: dict[str, Any]) -> None:
    outcome, made = run_frozen(stage, **settings)
    assert outcome.metrics["miou"] > 80
    assert outcome.counts["test"] == 10
    assert outcome.notes["held_out_miou"] > 80
    assert pq.read_table(made.local("part-00000.parquet"))["class"].to_pylist() == ["red", "green", "blue"]
    drawn = resample(made, 100, 0)["miou"]
    assert drawn.min() <= outcome.metrics["miou"] <= drawn.max()
    assert made.read("preview.png").startswith(b"\x89PNG")


def test_the_best_on_held_out_images_is_taken(run_frozen: RunStage) -> None:
    chosen, _ = run_frozen(SegmentKnn, k=[500, 1], distance=["l2"])
    assert (chosen.notes["k"], chosen.notes["distance"]) == (1, "l2")
    most, _ = run_frozen(SegmentKnn, fingerprint="m2", k=[500], distance=["l2"])
    assert most.metrics["miou"] < chosen.metrics["miou"]
    assert "held_out_miou" not in most.notes, "there was nothing to choose"


def test_regressions_that_begin_where_another_ended_reach_the_same() -> None:
    """Of several strengths, each is tried from the one before; its fit is that of one tried alone."""
    generator = np.random.default_rng(0)
    vectors, labels = torch.from_numpy(generator.normal(size=(300, 4))).float(), generator.integers(0, 3, 300)
    vectors[range(300), labels] += 1
    pixels = torch.zeros(300, 4, dtype=torch.int16)
    pixels[range(300), labels] = 9
    asked = torch.from_numpy(generator.normal(size=(200, 4))).float()
    context: Any = Context("eval", "m", {}, None, Resources())  # type: ignore[arg-type]
    config = {"images": "i", "features": "f", "tolerance": 1e-6}
    stage = SegmentLogistic(SegmentLogisticConfig.model_validate(config | {"c": [100.0, 1e-3, 0.1]}))
    tried = list(stage.tried(context, Patches(vectors, pixels), asked))
    assert [choice["c"] for choice, _ in tried] == [1e-3, 0.1, 100.0]
    for choice, found in tried:
        alone = stage.fitted(context, Patches(vectors, pixels), choice)(asked)
        assert (alone == found).float().mean() > 0.99


def test_fewer_patches_are_the_same_number_of_every_image(run_frozen: RunStage) -> None:
    outcome, _ = run_frozen(SegmentKnn, patches=200, k=[3])
    assert 190 <= outcome.counts["patches"] <= 200, "a patch of void alone is left out"
    assert outcome.metrics["miou"] > 70


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from(["cosine", "l2"]))
def test_neighbours_and_their_vote_are_those_of_a_slow_search(seed: int, k: int, distance: str) -> None:
    generator = np.random.default_rng(seed)
    bank, asked = generator.normal(size=(12, 4)), generator.normal(size=(5, 4))
    labels = generator.integers(0, 3, 12)
    pixels = torch.zeros(12, 4, dtype=torch.int16)
    pixels[range(12), labels] = 9
    train = Patches(torch.from_numpy(bank).float(), pixels)
    found = LabelledNeighbors(train, distance).labels_of(torch.from_numpy(asked).float(), k)
    for row, one in enumerate(asked):
        if distance == "l2":
            far = [np.linalg.norm(one - other) for other in bank]
        else:
            far = [1 - one @ other / np.linalg.norm(one) / np.linalg.norm(other) for other in bank]
        near = labels[np.argsort(far)[:k]]
        assert found[row].tolist() == near.tolist()
        assert majority(found, 3)[row] == np.bincount(near, minlength=3).argmax()


@given(st.integers(0, 2**32 - 1))
def test_labels_and_scores_of_patches_are_those_of_their_pixels(seed: int) -> None:
    generator = np.random.default_rng(seed)
    mask = generator.integers(-1, 3, (2 * CELL, 3 * CELL)).astype(np.int16)
    counts = class_pixels(mask, (2, 3), 3)
    for y in range(2):
        for x in range(3):
            inside = mask[y * CELL :, x * CELL :][:CELL, :CELL]
            assert counts[3 * y + x].tolist() == [int((inside == value).sum()) for value in (0, 1, 2, -1)]
    patches = Patches(torch.zeros(6, 1), counts)
    given_classes = torch.from_numpy(generator.integers(0, 3, 6))
    pixels = enlarged(given_classes.reshape(2, 3).numpy(), mask.shape)
    assert np.array_equal(patches.matrix(given_classes), confusion(mask, pixels, 3))
    assert scores(patches.matrix(given_classes)).miou >= 0


def test_constant_channels_and_void_patches() -> None:
    patches = Patches(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.tensor([[1, 0, 2], [0, 2, 2]], dtype=torch.int16))
    assert [values.tolist() for values in scale(patches)] == [[2.0, 5.0], [1.0, 1.0]]
    assert patches.labels.tolist() == [2, 1], "of equally frequent classes the first; void needs more"
    assert patches.labelled().vectors.tolist() == [[3.0, 5.0]]


def test_a_tenth_is_held_out() -> None:
    rest, held = held_out(40, 0, parts=10)
    assert (len(rest), len(held)) == (36, 4)
    assert sorted([*rest, *held]) == list(range(40))


@pytest.mark.parametrize(("stage", "settings"), STAGES)
def test_bad_input_is_named(
    run_frozen: RunStage, store: ArtifactStore, coloured: Artifact, stage: type[Any], settings: dict[str, Any]
) -> None:
    one = with_masks(store, coloured, dict.fromkeys(range(20), encode_mask(np.zeros((40, 48), np.uint8))))
    with pytest.raises(SourceError, match="patches of split 'train' are of one class or void"):
        run_frozen(stage, images=one, **settings)
    with pytest.raises(SourceError, match=r"no image of split 'test' .* has a mask"):
        run_frozen(stage, fingerprint="m2", test_split="test", **settings)


@pytest.mark.parametrize(("stage", "settings"), STAGES)
def test_a_class_without_train_images_and_a_mask_of_unknown_values(
    run_frozen: RunStage, store: ArtifactStore, coloured: Artifact, stage: type[Any], settings: dict[str, Any]
) -> None:
    """The class counts as wrong; the image whose mask cannot be read is named."""
    masks = {i: encode_mask(np.repeat([[0, 1]], 40, 0).repeat(24, 1).astype(np.uint8)) for i in range(20)}
    masks[25] = encode_mask(np.full((40, 48), 9, np.uint8))
    images = with_masks(store, coloured, masks)  # type: ignore[arg-type]
    outcome, made = run_frozen(stage, images=images, **settings)
    rows = {row["class"]: row for row in pq.read_table(made.local("part-00000.parquet")).to_pylist()}
    assert rows["blue"]["iou"] == 0
    assert rows["blue"]["pixels"] > 0
    assert [problem["key"] for problem in outcome.problems] == ["25.png"]
    assert "which is no class" in outcome.problems[0]["reason"]


def test_a_single_train_image_leaves_nothing_to_choose_on(
    run_frozen: RunStage, store: ArtifactStore, coloured: Artifact
) -> None:
    single = with_masks(store, coloured, dict.fromkeys(range(2, 20)) | {0: None})
    with pytest.raises(SourceError, match="has one image with a mask: give one value of each"):
        run_frozen(SegmentKnn, images=single)
    with pytest.raises(UsageError, match=r"stages\.eval\.k: 500, but there are \d+ train patches"):
        run_frozen(SegmentKnn, images=single, fingerprint="m2", k=[500], distance=["l2"])


@pytest.mark.parametrize(
    ("config", "settings"),
    [(SegmentKnnConfig, {"k": []}), (SegmentKnnConfig, {"distance": []}), (SegmentLogisticConfig, {"c": [0.0]})],
)
def test_rules_of_the_settings(config: type[Any], settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"give positive numbers|name at least one"):
        config.model_validate({"images": "i", "features": "f", **settings})
