"""Aggregated similarity: scores and correlation against slow counts, the stage's maps, bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import SourceError, UsageError
from pipeline.stage import Feed
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data.images import encode_mask
from stages.data.units import resample
from stages.evaluate.measure_similarity import MeasureSimilarity, MeasureSimilarityConfig
from stages.evaluate.similarity_score import aggregated_similarity, area_correlation

from .conftest import RunStage
from .test_segment_linear import with_masks

SMALL: dict[str, Any] = {"size": 32, "random_baseline": False}


@given(st.integers(0, 2**32 - 1))
def test_the_score_is_the_sum_of_all_cosines(seed: int) -> None:
    map_Dhw = np.random.default_rng(seed).normal(size=(4, 3, 5)) + 0.5
    vectors = map_Dhw.reshape(4, -1).T
    sums = [sum(a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in vectors) for a in vectors]
    found = aggregated_similarity(torch.from_numpy(map_Dhw))
    assert found.max() == 1
    assert found.flatten().tolist() == pytest.approx((np.array(sums) / max(sums)).tolist(), abs=1e-5)


def test_ideal_regions_are_as_bright_as_they_are_large() -> None:
    labels = np.array([[0, 0, 0, 0], [1, 1, 2, -1]])
    features = torch.nn.functional.one_hot(torch.from_numpy(labels).clamp(min=0), 3).permute(2, 0, 1).float()
    score = aggregated_similarity(features)
    assert score[0, 0] == 1
    assert score[1, 0] == pytest.approx(2 / 5)
    assert area_correlation(score.numpy(), labels) == pytest.approx(1)
    assert area_correlation(-score.numpy(), labels) == pytest.approx(-1)
    assert area_correlation(score.numpy(), np.array([[0] * 4, [1] * 4])) is None, "regions of one size"
    assert area_correlation(score.numpy(), np.full((2, 4), -1)) is None
    assert area_correlation(np.ones((2, 4), np.float32), labels) is None


def test_correlation_is_that_of_ranks() -> None:
    labels = np.array([0, 1, 1, 2, 2, 2])
    score = np.array([0.3, 0.2, 0.6, 0.5, 0.9, 0.8], np.float32)
    area_ranks, score_ranks = np.array([1, 2.5, 2.5, 5, 5, 5]), np.array([2, 1, 4, 3, 6, 5])
    assert area_correlation(score, labels) == pytest.approx(np.corrcoef(area_ranks, score_ranks)[0, 1])


def test_maps_scores_and_layers(run: RunStage) -> None:
    outcome, made = run(MeasureSimilarity, **(SMALL | {"random_baseline": True}))
    assert set(outcome.metrics) == {"area_correlation", "area_correlation_random"}
    assert outcome.metrics["area_correlation"] > 20, "each colour is like itself, and the left one is the larger"
    table = pq.read_table(made.local("part-00000.parquet")).to_pylist()
    assert [row["layer"] for row in table] == ["block_0"]
    assert table[-1]["area_correlation"] == pytest.approx(outcome.metrics["area_correlation"])
    assert -1 <= table[-1]["brightness"] <= 1
    assert outcome.notes == {"layer": "block_0"}
    assert [problem["key"] for problem in outcome.problems] == ["22.png", "26.png", "27.png"], "of one colour"
    assert outcome.counts == {"images": 7, "without_regions": 0, "unusable": 3}
    drawn = resample(made, 100, 0)["area_correlation"]
    assert drawn.min() <= outcome.metrics["area_correlation"] <= drawn.max()
    assert made.read("preview.png").startswith(b"\x89PNG")


def test_bad_input_is_named(run: RunStage, store: ArtifactStore, coloured: Artifact) -> None:
    with pytest.raises(UsageError, match=r"stages\.eval\.layers: the encoder has no layer c5; it has block_0"):
        run(MeasureSimilarity, layers=["c5"], **SMALL)
    with pytest.raises(UsageError, match=r"stages\.eval\.size: 30 pixels do not split into patches of 8"):
        run(MeasureSimilarity, fingerprint="m2", **(SMALL | {"size": 30}))
    one = with_masks(store, coloured, dict.fromkeys(range(30), encode_mask(np.zeros((40, 48), np.uint8))))
    with pytest.raises(SourceError, match=r"regions of two sizes; the first problem is 20\.png: its mask shows"):
        run(MeasureSimilarity, images=one, fingerprint="m3", **SMALL)


def test_images_without_masks_are_refused_when_planning() -> None:
    config = MeasureSimilarityConfig.model_validate({"images": "i", "encoder": "e"})
    feed = Feed("i", "images", "1", {}, config, {"images": 3, "masks": 0}, None)
    [(path, what, _)] = MeasureSimilarity(config).mismatches({"images": feed})
    assert path == "images"
    assert what.startswith("i has no masks")
