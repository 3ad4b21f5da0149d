"""Crops: pixels, masks and boxes stay together, whatever is cut, scaled and mirrored."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.finetune.data.placement import Placement, jittered, mirrored, resized_crop, scaled_crop, whole


def painted(box: tuple[int, int, int, int], width: int, height: int) -> np.ndarray:
    image = np.zeros((height, width, 3), np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = 255
    return image


@given(st.integers(0, 10_000), st.sampled_from(["stretched", "scaled", "whole"]), st.booleans())
def test_a_box_bounds_the_same_pixels_in_image_and_mask(seed: int, kind: str, flip: bool) -> None:
    rng = np.random.default_rng(seed)
    width, height, box = 90, 70, (20, 15, 70, 50)
    if kind == "stretched":
        placed = resized_crop(rng, width, height, size=64, scale=(0.4, 1.0), ratio=(0.7, 1.4))
    elif kind == "scaled":
        placed = scaled_crop(rng, width, height, size=64, factor=float(rng.uniform(0.4, 2)))
    else:
        placed = whole(width, height, (120, 60))
    placed = mirrored(placed, rng, float(flip))
    image = painted(box, width, height)
    [(x0, y0, x1, y1)] = placed.boxes(np.array([box], np.float32))
    seen = placed.pixels(image)[..., 0] > 127
    mask = placed.mask((image[..., 0] > 0).astype(np.int16), -1)
    assert seen.shape == mask.shape == placed.size[::-1]
    for found in (seen, mask == 1):
        ys, xs = np.nonzero(found)
        if not len(xs):
            assert x1 - x0 < 1.5 or y1 - y0 < 1.5
            continue
        edges = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert np.abs(np.array(edges) - [x0, y0, x1, y1]).max() <= 1


def test_what_is_missing_is_void_in_the_mask() -> None:
    placed = scaled_crop(np.random.default_rng(0), 40, 20, size=64, factor=1.0)
    assert placed == Placement((0, 0, 40, 20), (0, 0, 40, 20), (64, 64))
    mask = placed.mask(np.ones((20, 40), np.int16), -1)
    assert (mask[:20, :40] == 1).all()
    assert (mask[20:] == -1).all()
    assert (mask[:, 40:] == -1).all()


def test_a_box_outside_of_the_crop_has_no_area() -> None:
    placed = Placement((0, 0, 10, 10), (0, 0, 20, 20), (20, 20))
    [(x0, _, x1, _)] = placed.boxes(np.array([[30, 2, 40, 8]], np.float32))
    assert x0 == x1


@pytest.mark.parametrize("strength", [0.0, 0.4])
def test_jitter_changes_colours_and_nothing_else(strength: float) -> None:
    image = np.random.default_rng(0).integers(60, 200, (8, 8, 3)).astype(np.uint8)
    changed = jittered(np.random.default_rng(1), image, strength)
    assert changed.shape == image.shape
    assert changed.dtype == np.uint8
    assert np.array_equal(changed, image) is (strength == 0)
