"""Linear and few-shot classification, and the measures of classes, on stored features."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.errors import SourceError
from pipeline.stage import Feed
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data.rows import read_shard
from stages.data.units import keys_of, resample
from stages.evaluate.classify_few_shot import ClassifyFewShot, ClassifyFewShotConfig
from stages.evaluate.classify_linear import ClassifyLinear
from stages.evaluate.linear_classifier import choose_rate, fit, standardised
from stages.evaluate.measure_classes import MeasureClasses
from tests.stages.evaluate.conftest import RunStage

OPTIONS = {"epochs": 30, "batch_size": 64, "momentum": 0.9, "weight_decay": 0.0}


@pytest.fixture
def noise(store: ArtifactStore, features: Artifact) -> Artifact:
    """Features that say nothing about the images; those of image 25 are missing."""
    writer = store.begin("features", "noise")
    generator = np.random.default_rng(0)
    for index, shard in enumerate(features.shards()):
        table = read_shard(features, shard)
        vectors = [generator.normal(size=3).astype(np.float16) for _ in range(len(table))]
        table = table.set_column(2, table.schema.field(2), [vectors])
        kept = [row for row, image_id in enumerate(table["image_id"].to_pylist()) if image_id != 25]
        writer.put_table(index, table.take(kept))
    return writer.commit()


def test_linear_classification_tells_colours(run_frozen: RunStage) -> None:
    outcome, artifact = run_frozen(ClassifyLinear, epochs=60)
    assert outcome.metrics["top1"] == 100
    assert outcome.metrics["top5"] == 100
    assert outcome.notes["lr"] in (1e-3, 1e-2, 1e-1)
    assert keys_of(artifact) == [f"{i}.png" for i in range(20, 30)]
    assert resample(artifact, 10, 0)["top1"].tolist() == [100.0] * 10
    assert pq.read_table(artifact.local("part-00000.parquet"))["rank"].to_pylist() == [0] * 10


def test_of_features_that_say_nothing_it_makes_nothing(run_frozen: RunStage, noise: Artifact) -> None:
    outcome, _ = run_frozen(ClassifyLinear, given=noise)
    assert outcome.metrics["top1"] < 90
    assert outcome.problems == [{"key": "25.png", "reason": "it has no features (see the problems of their stage)"}]
    assert outcome.counts == {"train": 20, "test": 9, "classes": 3, "unusable": 1}


def test_patch_means_can_take_the_vectors_place(run_frozen: RunStage) -> None:
    outcome, _ = run_frozen(ClassifyLinear, epochs=60, pooling="mean")
    assert outcome.metrics["top1"] == 100


def test_the_layer_is_that_of_sgd_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors, labels = torch.randn(8, 3, generator=generator), torch.arange(8) % 2
    options = {"classes": 2, "epochs": 1, "batch_size": 8, "momentum": 0.0, "weight_decay": 0.0, "seed": 4}
    layer = fit(vectors, labels, lr=0.5, **options)  # type: ignore[arg-type]
    weight = torch.empty(2, 3).normal_(std=0.01, generator=torch.Generator().manual_seed(4))
    error = (vectors @ weight.T).softmax(dim=1) - torch.nn.functional.one_hot(labels, 2)
    torch.testing.assert_close(layer.weight.detach(), weight - 0.5 * 8 / 256 * error.T @ vectors / 8)


def test_the_rate_is_chosen_on_images_that_are_not_learnt_from() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    vectors = torch.randn(200, 4, generator=generator) + 3.0 * labels[:, None]
    assert choose_rate(vectors, labels, [1e-9, 1e-1], classes=2, seed=0, **OPTIONS) == 1e-1
    assert choose_rate(vectors, labels, [0.3], classes=2, seed=0, **OPTIONS) == 0.3


def test_standardising_uses_the_train_images_alone() -> None:
    train, test = standardised(torch.tensor([[0.0, 5.0], [2.0, 5.0]]), torch.tensor([[4.0, 6.0]]))
    assert train.tolist() == [[-1.0, 0.0], [1.0, 0.0]]
    assert test[0, 0].item() == 3.0


def test_few_shot_episodes(run_frozen: RunStage, noise: Artifact) -> None:
    outcome, artifact = run_frozen(ClassifyFewShot, ways=3, shots=2, queries=3, episodes=50)
    assert outcome.metrics["accuracy"] == 100
    assert keys_of(artifact)[:2] == ["episode 0", "episode 1"]
    guessed, _ = run_frozen(ClassifyFewShot, ways=3, shots=2, queries=3, episodes=200, given=noise, fingerprint="m2")
    assert guessed.metrics["accuracy"] == pytest.approx(33, abs=12)
    assert 0 < guessed.notes["interval"] < 5


def test_fewer_images_than_shots_are_named(run_frozen: RunStage) -> None:
    with pytest.raises(SourceError, match="0 classes have 9 train images and a test image, an episode needs 3"):
        run_frozen(ClassifyFewShot, ways=3, shots=9)


def test_more_ways_than_classes_are_refused_when_planning() -> None:
    config = ClassifyFewShotConfig.model_validate({"images": "i", "features": "f", "ways": 5})
    contents = {name: {"images": 9, "labels": 9, "label_classes": 3} for name in ("train", "val")}
    images = Feed("i", "images", "1", {}, config, {"labels": 18}, {"contents": contents})
    features = Feed("f", "features", "2", {"images": images}, config)
    [(path, what, remedy)] = ClassifyFewShot(config).mismatches({"images": images, "features": features})
    assert (path, remedy) == ("ways", "set it to 3 or fewer")
    assert what == "an episode has 5 classes, and the labelled train images are of 3"


def test_features_of_other_images_are_refused_when_planning() -> None:
    config = ClassifyFewShotConfig.model_validate({"images": "i", "features": "f", "ways": 2})
    images, others = Feed("i", "images", "1", {}, config), Feed("o", "images", "3", {}, config)
    features = Feed("f", "features", "2", {"images": others}, config)
    [(path, what, _)] = ClassifyFewShot(config).mismatches({"images": images, "features": features})
    assert path == "features"
    assert what == "f holds the features of o, and this stage evaluates on i"


def test_classes_that_lie_apart(run_frozen: RunStage, noise: Artifact) -> None:
    told, artifact = run_frozen(MeasureClasses)
    mixed, _ = run_frozen(MeasureClasses, given=noise, fingerprint="m2")
    assert told.metrics["separation"] > 2 * mixed.metrics["separation"]
    assert told.metrics["intra_class_variance"] < mixed.metrics["intra_class_variance"]
    assert resample(artifact, 10, 0) == {}


def test_one_class_alone_cannot_be_measured(run_frozen: RunStage) -> None:
    with pytest.raises(SourceError, match="no image of split 'test'"):
        run_frozen(MeasureClasses, test_split="test")
