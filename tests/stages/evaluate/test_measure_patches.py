"""Similarity of patches by class: the stage, and the area under the curve against a count by hand."""

from __future__ import annotations

import itertools

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.data.units import resample
from stages.evaluate.measure_patches import MeasurePatches
from stages.evaluate.patch_pairs import auroc
from tests.stages.evaluate.conftest import RunStage

values = st.lists(st.integers(-3, 3), min_size=1, max_size=8)


@given(values, values)
def test_the_area_is_the_share_of_pairs_in_order(one: list[int], other: list[int]) -> None:
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in itertools.product(one, other)]
    assert auroc(torch.tensor(one).float(), torch.tensor(other).float()) == pytest.approx(sum(pairs) / len(pairs))


def test_patches_of_one_colour_are_alike(run_frozen: RunStage) -> None:
    outcome, artifact = run_frozen(MeasurePatches)
    assert outcome.metrics["auroc"] > 99
    assert outcome.metrics["same_class_cosine"] > outcome.metrics["other_class_cosine"] + 0.5
    assert outcome.counts["images"] == 10
    table = pq.read_table(artifact.local("part-00000.parquet")).to_pandas()
    assert table["share"].iloc[-1] > 0.9  # of the most alike pairs
    assert table["share"].iloc[0] < 0.1
    assert abs(resample(artifact, 50, 0)["auroc"].mean() - outcome.metrics["auroc"]) < 1
    assert artifact.read("preview.png").startswith(b"\x89PNG")
