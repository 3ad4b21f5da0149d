"""Scores over the share of the labels: which images keep theirs, what can be told, and the stage on both tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.errors import SourceError
from pipeline.stage import Context, Feed, Outcome, Resources
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data.rows import read_shard
from stages.data.units import Units
from stages.evaluate.few_label_classifiers import regression
from stages.evaluate.label_curves import LabelCurves, draw_images, verdict
from stages.evaluate.label_efficiency import LabelEfficiency
from stages.evaluate.label_efficiency_settings import LabelEfficiencyConfig

Run = Callable[..., tuple[Outcome, Artifact]]
ENCODERS = [{"name": "good", "features": "of_good"}, {"name": "noise", "features": "of_noise"}]


@pytest.fixture
def noise(store: ArtifactStore, features: Artifact) -> Artifact:
    """Features that say nothing about the images."""
    writer = store.begin("features", "noise")
    generator = np.random.default_rng(0)
    for index, shard in enumerate(features.shards()):
        table = read_shard(features, shard)
        for place, name, length in ((2, "vector", 3), (3, "patches", 90)):
            values = [generator.normal(size=length).astype(np.float16) for _ in range(len(table))]
            table = table.set_column(table.schema.get_field_index(name), table.schema.field(place), [values])
        writer.put_table(index, table)
    return writer.commit()


@pytest.fixture
def measure(store: ArtifactStore, coloured: Artifact, features: Artifact, noise: Artifact) -> Run:
    """`measure(key=value, ...)`: the stage on good features and on those that say nothing."""

    def go(**settings: Any) -> tuple[Outcome, Artifact]:
        given = {"images": "images", "encoders": ENCODERS, "resamples": 200, "fractions": [0.3, 1.0], **settings}
        writer = store.begin("metrics", "m1")
        inputs = {"images": coloured, "encoders.0.features": features, "encoders.1.features": noise}
        context = Context("labels", "m1", inputs, writer, Resources())
        outcome = LabelEfficiency(LabelEfficiencyConfig.model_validate(given)).run(context)
        return outcome, writer.commit(metrics=outcome.metrics, preview=outcome.preview)

    return go


@given(
    classes=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    fraction=st.floats(0.01, 1.0),
    seed=st.integers(0, 9),
)
def test_every_class_keeps_its_share_and_one_image_at_least(classes: list[int], fraction: float, seed: int) -> None:
    rows = draw_images(classes, fraction, (seed, 0))
    assert len(set(rows.tolist())) == len(rows)
    for one in set(classes):
        assert sum(classes[row] == one for row in rows) == max(1, round(fraction * classes.count(one)))
    assert set(rows) <= set(draw_images(classes, 1.0, (seed, 0)))
    assert set(draw_images(classes, fraction / 2, (seed, 0))) <= set(rows)


def test_other_draws_are_of_other_images() -> None:
    first, second = (draw_images([0] * 100, 0.1, (0, draw)).tolist() for draw in (0, 1))
    assert first != second


def test_classification_with_a_share_of_the_labels(measure: Run) -> None:
    outcome, artifact = measure()
    assert outcome.metrics["good/30"] == outcome.metrics["good/100"] == 100
    assert outcome.metrics["noise/100"] < 80
    assert outcome.metrics["above/noise"] > 20
    assert outcome.notes["verdicts"] == ["good: better than noise from 30 % to 100 % of the labels"]
    assert artifact.read("verdict.txt").decode().strip() == outcome.notes["verdicts"][0]
    rows = pq.read_table(artifact.local("part-00000.parquet")).to_pylist()
    assert [(row["encoder"], row["images"]) for row in rows] == [("good", 6), ("good", 20), ("noise", 6), ("noise", 20)]
    assert rows[0]["lead"] is None
    assert rows[3]["lead"] == pytest.approx(100 - outcome.metrics["noise/100"])
    assert rows[3]["lead_low"] <= rows[3]["lead"] <= rows[3]["lead_high"]
    assert outcome.counts == {"train": 20, "test": 10, "unusable": 0}
    assert artifact.read("preview.png").startswith(b"\x89PNG")


def test_segmentation_with_a_share_of_the_masks(measure: Run) -> None:
    outcome, _ = measure(task="segmentation", c=[1.0], draws=2)
    assert outcome.metrics["good/100"] > 80  # not 100: a patch is larger than the void stripe between two classes
    assert outcome.metrics["noise/100"] < 40
    assert outcome.notes["verdicts"] == ["good: better than noise from 30 % to 100 % of the labels"]


def test_equal_encoders_cannot_be_told_apart(store: ArtifactStore, coloured: Artifact, noise: Artifact) -> None:
    config = LabelEfficiencyConfig.model_validate({"images": "images", "encoders": ENCODERS, "fractions": [0.5, 1.0]})
    inputs = {"images": coloured, "encoders.0.features": noise, "encoders.1.features": noise}
    outcome = LabelEfficiency(config).run(Context("labels", "m2", inputs, store.begin("metrics", "m2"), Resources()))
    assert outcome.metrics["above/noise"] == 0
    assert outcome.notes["verdicts"] == ["good: no difference can be told from noise from 50 % to 100 % of the labels"]


def test_a_verdict_says_where_it_changes() -> None:
    def row(fraction: float, low: float, high: float) -> dict[str, float]:
        return {"fraction": fraction, "lead_low": low, "lead_high": high}

    rows = [row(0.01, 1, 3), row(0.05, 0.5, 2), row(0.1, -1, 1), row(1.0, -3, -1)]
    assert verdict("a", "b", rows) == (
        "a: better than b from 1 % to 5 % of the labels; no difference can be told at 10 %; worse than b at 100 %"
    )


def test_draws_of_labels_widen_an_interval() -> None:
    def curve(scores: list[float]) -> dict[str, Any]:
        curves = LabelCurves(["a", "b"], [1.0])
        for name in ("a", "b"):
            for score in scores:
                units = Units()
                for image in range(400):
                    units.add(str(image), {"top1": 100.0 * (image % 100 < score)})
                curves.add(name, 1.0, 10, units)
        return curves.rows(500, seed=0)[0]

    steady, shaky = curve([50, 50, 50]), curve([30, 50, 70])
    assert steady["score"] == shaky["score"] == 50
    assert steady["spread"] == 0
    assert shaky["spread"] == pytest.approx(20)
    assert shaky["high"] - shaky["low"] > 1.5 * (steady["high"] - steady["low"])


def test_the_penalty_is_chosen_on_images_that_are_not_learnt_from() -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 2
    vectors = (generator.normal(size=(60, 40)) + 0.8 * labels[:, None] * (np.arange(40) < 3)).astype(np.float32)
    strong = regression("s", vectors, labels, np.arange(60), [1e-2, 1e3], seed=0)
    assert strong.named_steps["logisticregression"].C == 1e-2  # with 40 channels, 60 vectors can be learnt by heart
    few = regression("s", vectors[:4], labels[:4], np.arange(4), [1e-2, 1.0, 1e3], seed=0)
    assert few.named_steps["logisticregression"].C == 1.0


def test_labels_of_one_class_are_an_error() -> None:
    with pytest.raises(SourceError, match=r"all of one class.*stages\.s\.fractions"):
        regression("s", np.ones((4, 2), np.float32), np.zeros(4, np.int64), np.arange(4), [1.0], seed=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fractions": [0.0, 1.0]}, "above 0"),
        ({"fractions": [1.5]}, "up to 1"),
        ({"c": [-1.0]}, "positive"),
        ({"encoders": [ENCODERS[0]]}, "at least 2"),
        ({"encoders": [ENCODERS[0], ENCODERS[0]]}, "twice"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        LabelEfficiencyConfig.model_validate({"images": "images", "encoders": ENCODERS, **change})


def test_features_of_other_images_are_refused_when_planning() -> None:
    config = LabelEfficiencyConfig.model_validate({"images": "images", "encoders": ENCODERS})
    images, others = (Feed(name, "images", name, {}, config) for name in ("images", "others"))
    feeds = {
        "images": images,
        "encoders.0.features": Feed("of_good", "features", "f", {"images": images}, config),
        "encoders.1.features": Feed("of_noise", "features", "g", {"images": others}, config),
    }
    [(path, what, _)] = LabelEfficiency(config).mismatches(feeds)
    assert path == "encoders.1.features"
    assert "of_noise holds the features of others" in what
