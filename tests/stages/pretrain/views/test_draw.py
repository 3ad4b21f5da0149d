"""Draws obey their plan, and hang on seed, epoch and image alone."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.pretrain.views.draw import draw_colour, draw_views, generator, reduction
from stages.pretrain.views.geometry import area, intersect, rectangle
from stages.pretrain.views.plan import Draw, Photometric, ViewSpec

FULL = Photometric(jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray_p=0.2, blur_p=0.5, solarize_p=0.2)
PLAN = (
    ViewSpec("global", 224, 2, (0.25, 1.0), flip_p=0.5, photometric=FULL),
    ViewSpec("local", 96, 4, (0.05, 0.25), photometric=FULL, min_overlap=0.01, overlap_with="global"),
)


def shown(item: Draw) -> np.ndarray:
    return rectangle(item.affine, item.size)


def test_same_numbers_same_draws() -> None:
    first = draw_views(PLAN, generator(1, 2, 0, 3), 640, 480)
    again = draw_views(PLAN, generator(1, 2, 0, 3), 640, 480)
    assert pickle.dumps(first) == pickle.dumps(again)
    for other in ((2, 2, 0, 3), (1, 3, 0, 3), (1, 2, 1, 3), (1, 2, 0, 4)):
        assert pickle.dumps(draw_views(PLAN, generator(*other), 640, 480)) != pickle.dumps(first)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 1000))
def test_crops_lie_on_whole_pixels_of_the_image_at_the_reduced_scale(width: int, height: int, seed: int) -> None:
    draws = draw_views(PLAN, generator(seed, 0, 0, 0), width, height)
    assert [item.view for item in draws] == ["global"] * 2 + ["local"] * 4
    reduced = reduction(draws)
    for item in draws:
        rect = shown(item).round(9)
        assert rect[0] >= 0
        assert rect[1] >= 0
        assert rect[2] <= width
        assert rect[3] <= height
        assert (rect[2:] > rect[:2]).all()
        np.testing.assert_allclose(rect / reduced, np.rint(rect / reduced), atol=1e-9)
        if reduced > 1:  # then no view needs more pixels than the smaller image has
            assert abs(item.affine[0, 0]) >= reduced
            assert item.affine[1, 1] >= reduced


def test_area_and_ratio_follow_the_plan() -> None:
    spec = ViewSpec("v", 32, 1, (0.2, 0.6), (0.5, 2.0))
    rects = [shown(draw_views([spec], generator(0, 0, 0, i), 1000, 800)[0]) for i in range(400)]
    areas = [area(rect) / 800_000 for rect in rects]
    ratios = [(rect[2] - rect[0]) / (rect[3] - rect[1]) for rect in rects]
    assert 0.18 < min(areas) < 0.23
    assert 0.55 < max(areas) < 0.61
    assert 0.45 < min(ratios) < 0.6
    assert 1.7 < max(ratios) < 2.1
    assert np.std([rect[0] for rect in rects]) > 100  # they move about


def test_nested_crops_stay_inside_their_parent() -> None:
    specs = (
        ViewSpec("teacher", 224, 2, (0.3, 0.6)),
        ViewSpec("same", 224, 2, (1.0, 1.0), (1.0, 1.0), parent="teacher"),
        ViewSpec("student", 96, 4, (0.1, 0.4), parent="teacher"),
    )
    for i in range(50):
        draws = draw_views(specs, generator(0, 0, 0, i), 500, 375)
        rects = {name: [shown(d) for d in draws if d.view == name] for name in ("teacher", "same", "student")}
        np.testing.assert_array_equal(rects["same"], rects["teacher"])
        for k, rect in enumerate(rects["student"]):
            parent = rects["teacher"][k % 2]
            assert (rect[:2] >= parent[:2]).all()
            assert (rect[2:] <= parent[2:]).all()
            assert 0.05 < area(rect) / area(parent) < 0.45


def test_min_overlap_holds() -> None:
    specs = (
        ViewSpec("global", 224, 2, (0.25, 0.4), min_overlap=0.1, overlap_with="global"),
        ViewSpec("local", 96, 4, (0.05, 0.25), min_overlap=0.03, overlap_with="global"),
    )
    for i in range(50):
        draws = draw_views(specs, generator(0, 0, 0, i), 500, 375)
        rects = [shown(item) for item in draws]
        shares = [[area(intersect(a, b)[0]) / (500 * 375) for b in rects[:2]] for a in rects]
        assert shares[0][1] > 0.1
        assert min(min(row) for row in shares[2:]) > 0.03


def test_an_overlap_out_of_reach_takes_the_best_of_its_tries() -> None:
    specs = (ViewSpec("a", 32, 1, (0.05, 0.05)), ViewSpec("b", 32, 1, (0.05, 0.05), min_overlap=0.9, overlap_with="a"))
    draws = draw_views(specs, generator(0, 0, 0, 0), 500, 375)
    assert area(intersect(shown(draws[0]), shown(draws[1]))[0]) > 0


def test_whole_view_and_flip() -> None:
    item = draw_views([ViewSpec("all", 64, 1, whole=True, flip_p=1.0)], generator(0, 0, 0, 0), 501, 33)[0]
    np.testing.assert_allclose(shown(item), [0, 0, 501, 33])
    assert item.affine[0, 0] < 0


def test_colour_probabilities_and_ranges() -> None:
    draws = [draw_colour(FULL, generator(0, 0, 0, i)) for i in range(2000)]
    seen = Counter(key for colour in draws for key in colour)
    for key, p in {"brightness": 0.8, "hue": 0.8, "order": 0.8, "gray": 0.2, "blur": 0.5, "solarize": 0.2}.items():
        assert abs(seen[key] / 2000 - p) < 0.04, key
    assert len({colour["order"] for colour in draws if "order" in colour}) == 24
    assert 0.6 <= min(c["brightness"] for c in draws if "brightness" in c) < 0.65
    assert all(-0.1 <= c["hue"] <= 0.1 for c in draws if "hue" in c)
    assert all(0.1 <= c["blur"] <= 2.0 for c in draws if "blur" in c)
    assert draw_colour(Photometric(), generator(0, 0, 0, 0)) == {}


def test_blur_else_solarize() -> None:
    """FLSL: half of the views may blur with blur_p, the other half blur with 0.1 and solarise with solarize_p."""
    photometric = Photometric(blur_p=0.5, solarize_p=0.2, blur_else_solarize_p=0.5)
    draws = [draw_colour(photometric, generator(0, 0, 0, i)) for i in range(4000)]
    assert abs(np.mean(["blur" in c for c in draws]) - (0.25 + 0.05)) < 0.03
    assert abs(np.mean(["solarize" in c for c in draws]) - 0.1) < 0.02


def test_photometric_a_view_must_match_the_count() -> None:
    with pytest.raises(ValueError, match="3 crops and 2 photometric"):
        draw_views([ViewSpec("v", 32, 3, photometric=(FULL, FULL))], generator(0, 0, 0, 0), 50, 50)
