"""DAVIS J and F against the golden file."""

from __future__ import annotations

import numpy as np

from stages.evaluate.video_scores import contour, contour_accuracy, region_similarity, score_object
from tests.golden.golden import load


def test_every_frame() -> None:
    golden = load("davis_j_and_f")
    for truth, found, j, f in zip(golden["truth"], golden["found"], golden["j"], golden["f"], strict=True):
        assert np.allclose([region_similarity(*pair) for pair in zip(truth, found, strict=True)], j, rtol=0, atol=1e-12)
        assert np.allclose([contour_accuracy(*pair) for pair in zip(truth, found, strict=True)], f, rtol=0, atol=1e-12)


def test_contours_are_half_pixel_edges() -> None:
    golden = load("davis_j_and_f")
    assert np.array_equal(contour(golden["truth"][0, 0]), golden["contour"][0])
    assert np.array_equal(contour(golden["found"][0, 0]), golden["contour"][1])


def test_means_leave_out_the_first_and_the_last_frame() -> None:
    golden = load("davis_j_and_f")
    objects = [score_object(*pair) for pair in zip(golden["truth"], golden["found"], strict=True)]
    assert np.isclose(np.mean([scores.j.mean() for scores in objects]), golden["j_mean"], rtol=0, atol=1e-12)
    assert np.isclose(np.mean([scores.f.mean() for scores in objects]), golden["f_mean"], rtol=0, atol=1e-12)
