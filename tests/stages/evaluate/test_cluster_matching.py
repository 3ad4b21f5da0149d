"""Matching clusters to classes: leftovers, ties, void pixels, and where the criteria disagree."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.data.confusion import confusion
from stages.evaluate.cluster_matching import (
    count_overlaps,
    match_greedily,
    match_one_to_one,
    merge_clusters,
    overlap_ious,
)


def test_void_is_not_counted() -> None:
    truth = np.array([[0, 1], [-1, 1]])
    clusters = np.array([[2, 0], [1, 0]])
    assert count_overlaps(truth, clusters, 2, 3).tolist() == [[0, 0, 1], [2, 0, 0]]


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 6))
def test_one_to_one_is_the_best_of_all_matches(seed: int, classes: int, clusters: int) -> None:
    counts = np.random.default_rng(seed).integers(0, 20, (classes, clusters))
    for by, gain in (("pixels", counts), ("iou", overlap_ious(counts))):
        mapping = match_one_to_one(counts, by=by)  # type: ignore[arg-type]
        taken = min(classes, clusters)
        best = max(
            sum(gain[c, k] for c, k in zip(rows, columns, strict=True))
            for rows in itertools.permutations(range(classes), taken)
            for columns in itertools.combinations(range(clusters), taken)
        )
        # Leftovers are class 0 whether or not a cluster was matched to it: count each class's best cluster once.
        reached = sum(max((gain[c, k] for k in np.flatnonzero(mapping == c)), default=0) for c in range(classes))
        assert reached == pytest.approx(best, abs=1e-9)


def test_leftover_clusters_are_class_zero() -> None:
    counts = np.array([[5, 0, 1], [0, 9, 0]])
    assert match_one_to_one(counts).tolist() == [0, 1, 0]
    counts = np.array([[0, 5, 0, 2], [9, 0, 3, 1]])
    assert match_one_to_one(counts).tolist() == [1, 0, 0, 0]


def test_greedy_criteria_can_disagree() -> None:
    # Cluster 1 is mostly class 0, of which it is a small part; of class 1 it is all.
    counts = np.array([[100, 3], [0, 2]])
    assert match_greedily(counts, by="precision").tolist() == [0, 0]
    assert match_greedily(counts, by="iou").tolist() == [0, 1]


@pytest.mark.parametrize("seed", range(3))
def test_merging_is_the_confusion_of_the_mapped_prediction(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, clusters = rng.integers(-1, 4, 500), rng.integers(0, 9, 500)
    counts = count_overlaps(truth, clusters, 4, 9)
    mapping = match_greedily(counts)
    np.testing.assert_array_equal(merge_clusters(counts, mapping), confusion(truth, mapping[clusters], 4))
