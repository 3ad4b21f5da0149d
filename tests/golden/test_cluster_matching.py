"""Cluster matching against the golden files of Leopart's and PiCIE's protocols."""

from __future__ import annotations

import numpy as np
import pytest

from stages.data.confusion import confusion, scores
from stages.evaluate.cluster_matching import count_overlaps, match_greedily, match_one_to_one, merge_clusters
from tests.golden.golden import load

CLASSES = 5


def test_leopart_one_to_one() -> None:
    golden = load("cluster_match_leopart")
    counts = count_overlaps(golden["gt"], golden["pred5"], CLASSES, 5)
    mapping = match_one_to_one(counts, by="iou")
    np.testing.assert_array_equal(mapping[golden["pred5"]], golden["hung_reordered"])
    miou = scores(merge_clusters(counts, mapping), absent="zero").miou
    assert miou / 100 == pytest.approx(float(golden["hung_miou"]), abs=1e-12)


@pytest.mark.parametrize(("by", "name"), [("iou", "many_iou"), ("precision", "many_prec")])
def test_leopart_many_to_one(by: str, name: str) -> None:
    golden = load("cluster_match_leopart")
    counts = count_overlaps(golden["gt"], golden["pred10"], CLASSES, 10)
    mapping = match_greedily(counts, by=by)  # type: ignore[arg-type]
    np.testing.assert_array_equal(mapping[golden["pred10"]], golden[f"{name}_reordered"])
    miou = scores(merge_clusters(counts, mapping), absent="zero").miou
    assert miou / 100 == pytest.approx(float(golden[f"{name}_miou"]), abs=1e-12)


def test_leopart_without_matching() -> None:
    golden = load("cluster_match_leopart")
    miou = scores(confusion(golden["gt"], golden["pred5"], CLASSES), absent="zero").miou
    assert miou / 100 == pytest.approx(float(golden["linear_miou"]), abs=1e-12)


def test_picie() -> None:
    golden = load("cluster_match_picie")
    counts = count_overlaps(golden["gt"], golden["pred"], CLASSES, 5)
    np.testing.assert_array_equal(counts, golden["hist"])
    mapping = match_one_to_one(counts)
    np.testing.assert_array_equal(mapping[golden["col"]], golden["row"])
    merged = merge_clusters(counts, mapping)
    got = scores(merged)
    assert got.pixel_accuracy == pytest.approx(float(golden["acc"]), abs=1e-12)
    assert got.pixel_accuracy == pytest.approx(float(golden["pix_acc"]), abs=1e-12)
    assert got.miou == pytest.approx(float(golden["miou"]), abs=1e-12)
    # PiCIE permutes the rows of its matrix where we merge columns: the same scores, classes under the other's names.
    np.testing.assert_array_equal(golden["hist"][mapping], golden["new_hist"])
    np.testing.assert_allclose(got.iou[mapping], golden["iou"], atol=1e-12, rtol=0)
