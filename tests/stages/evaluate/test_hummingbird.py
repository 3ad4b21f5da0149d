"""Hummingbird: the stage on features that tell the classes apart, the memory's quota, void."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import SourceError
from pipeline.store.artifact import Artifact
from stages.data.units import keys_of, resample
from stages.evaluate.hummingbird import Hummingbird
from stages.evaluate.in_context import class_shares, rare_first, recall_shares
from tests.stages.evaluate.conftest import RunStage


def test_features_that_tell_the_classes_apart_score_high(run_frozen: RunStage) -> None:
    outcome, artifact = run_frozen(Hummingbird, k=5)
    assert outcome.metrics["miou"] > 85  # not 100: a patch is larger than the void stripe between two classes
    assert outcome.counts["test"] == 10
    assert json.loads(artifact.read("metrics.json"))["protocol"]["k"] == 5
    assert pq.read_table(artifact.local("part-00000.parquet"))["class"].to_pylist() == ["red", "green", "blue"]
    assert keys_of(artifact)[0] == "20.png"
    drawn = resample(artifact, 100, seed=0)["miou"]
    assert drawn.min() <= outcome.metrics["miou"] <= drawn.max()
    assert artifact.read("preview.png").startswith(b"\x89PNG")


def test_shuffled_features_do_not(run_frozen: RunStage, features: Artifact, store: object) -> None:
    from pipeline.store.store import ArtifactStore
    from stages.data.rows import read_shard

    assert isinstance(store, ArtifactStore)
    writer = store.begin("features", "noise")
    generator = np.random.default_rng(0)
    for index, shard in enumerate(features.shards()):
        table = read_shard(features, shard)
        noise = [generator.normal(size=90).astype(np.float16) for _ in range(len(table))]
        writer.put_table(index, table.set_column(3, table.schema.field(3), [noise]))
    outcome, _ = run_frozen(Hummingbird, k=5, given=writer.commit())
    assert outcome.metrics["miou"] < 50


def test_a_small_memory_keeps_the_same_number_of_every_image(run_frozen: RunStage) -> None:
    outcome, _ = run_frozen(Hummingbird, memory=100)
    assert outcome.counts["memory"] == 100
    assert outcome.metrics["miou"] > 70


def test_a_split_without_masks_is_named(run_frozen: RunStage) -> None:
    with pytest.raises(SourceError, match=r"no image of split 'test' of .* has a mask"):
        run_frozen(Hummingbird, test_split="test")


@given(st.integers(1, 3), st.integers(1, 4), st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_shares_are_those_of_a_count_by_hand(rows: int, columns: int, patch: int, seed: int) -> None:
    labels = torch.from_numpy(np.random.default_rng(seed).integers(-1, 3, (rows * patch, columns * patch)))
    shares = class_shares(labels, patch, 3)
    for y in range(rows):
        for x in range(columns):
            inside = labels[y * patch :, x * patch :][:patch, :patch].flatten()
            counted = [(inside == label).sum().item() for label in range(3)]
            total = sum(counted)
            assert shares[y, x].tolist() == pytest.approx([n / total if total else 0 for n in counted])


def test_void_as_background_counts_as_the_first_class() -> None:
    labels = torch.tensor([[-1, -1], [2, 1]])
    assert class_shares(labels, 2, 3).tolist() == [[[0, 0.5, 0.5]]]
    assert class_shares(labels, 2, 3, void_as_background=True).tolist() == [[[0.5, 0.25, 0.25]]]


def test_the_quota_prefers_rare_classes_and_never_takes_void() -> None:
    shares = torch.zeros(20, 3)
    shares[:15, 0] = 1  # a common class
    shares[15:18, 1] = 1  # a rare one; the last two patches are void
    taken = [rare_first(shares, np.random.default_rng(seed).random(20), 5) for seed in range(200)]
    share = torch.cat([(rows >= 15).float() for rows in taken]).mean().item()
    assert share > 0.4  # 3 of 18 patches would be 0.17 without preference
    assert max(rows.max().item() for rows in taken) < 18
    assert len(rare_first(shares, np.random.default_rng(0).random(20), 50)) == 18


def test_a_query_gets_the_shares_of_its_nearest_when_the_temperature_is_low() -> None:
    shares = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    assert recall_shares(torch.tensor([[0.9, 0.5]]), shares, 1e-3).tolist() == [[1.0, 0.0]]
    assert recall_shares(torch.tensor([[0.5, 0.5]]), shares, 1e-3).tolist() == [[0.5, 0.5]]
