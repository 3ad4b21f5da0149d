"""Frames, centres and masks of views that share regions, beside their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.pretrain.methods.vice.regions import (
    MASKED,
    clip_centre,
    content_centre,
    content_map,
    mask_rectangle,
    mutual_regions,
    padded_frame,
    square,
    square_frame,
    standardise,
    surrounding_centre,
    von_mises_share,
)

SIDES = st.integers(1, 3000)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((640, 480), (1.0, 0, 10, 640, 500)),  # the shorter side is padded, nothing scaled
        ((400, 300), (1.25, 0, 62, 500, 500)),  # enlarged first
        ((4096, 1024), (0.5, 0, 0, 2048, 512)),  # shrunk
        ((500, 500), (1.0, 0, 0, 500, 500)),
    ],
)
def test_padded_frames(size: tuple[int, int], expected: tuple[float, int, int, int, int]) -> None:
    frame = padded_frame(*size, 500, 2048)
    assert (frame.scale, frame.left, frame.top, frame.width, frame.height) == expected


def test_square_frame_is_the_middle() -> None:
    frame = square_frame(640, 480, 320)
    assert (frame.width, frame.height) == (320, 320)
    np.testing.assert_allclose(frame.to_image((0, 0, 320, 320)), (80, 0, 560, 480), atol=1)


@given(SIDES, SIDES)
def test_the_frames_pixels_are_the_images(width: int, height: int) -> None:
    width, height = width % 400 + 1, height % 400 + 1
    image = np.full((height, width, 3), 200, np.uint8)
    for frame in (padded_frame(width, height, 100, 150), square_frame(width, height, 32)):
        pixels = standardise(image, frame)
        assert pixels.shape == (frame.height, frame.width, 3)
        # Grey inside the image and black around it, but for the pixels on its edge.
        x, y = np.arange(frame.width) + 0.5, np.arange(frame.height) + 0.5
        points_x, points_y = (x - frame.left) / frame.scale, (y - frame.top) / frame.scale
        edge = 1 / frame.scale
        for column, u in enumerate(points_x):
            for row in (0, frame.height // 2, frame.height - 1):
                v = points_y[row]
                if edge < u < width - edge and edge < v < height - edge:
                    assert pixels[row, column, 0] == 200
                elif u < -edge or u > width + edge or v < -edge or v > height + edge:
                    assert pixels[row, column, 0] == 0
        corner = frame.to_image((0, 0, frame.width, frame.height))
        np.testing.assert_allclose(corner[:2] * frame.scale, (-frame.left, -frame.top))
        np.testing.assert_allclose((corner[2:] - corner[:2]) * frame.scale, (frame.width, frame.height))


def test_content_is_where_edges_are() -> None:
    pixels = np.full((60, 80, 3), 90, np.uint8)
    pixels[30:, 40:] = 200
    weights = content_map(pixels)
    assert weights.min() == pytest.approx(0.005)
    assert weights[45, 38:43].max() > 0.9
    rng = np.random.default_rng(0)
    centres = np.array([content_centre(rng, weights) for _ in range(2000)])
    assert (centres >= 0).all()
    assert (centres < (80, 60)).all()
    expected = (weights / weights.sum())[28:33].sum()
    assert np.isin(centres[:, 1], range(28, 33)).mean() == pytest.approx(expected, abs=0.04)


@given(SIDES, SIDES, st.floats(1, 1000), st.integers(0, 2999), st.integers(0, 2999))
def test_a_clipped_square_lies_in_the_image_and_keeps_its_point(
    width: int, height: int, side: float, x: int, y: int
) -> None:
    x, y = min(x, width - 1), min(y, height - 1)
    at = clip_centre(x, y, side, width, height)
    x0, y0, x1, y1 = square(*at, side)
    for low, high, length, point in ((x0, x1, width, x), (y0, y1, height, y)):
        if np.ceil(side / 2) <= int(length - side / 2):
            assert low >= 0
            assert high <= length
            assert low - 1 <= point <= high
        else:  # as large as the image: centred on it
            assert abs((low + high) / 2 - length / 2) <= 0.5


@given(st.integers(0, 10_000), st.floats(2, 500), st.integers(0, 3))
def test_surrounding_views_contain_the_centre_and_keep_to_their_sector(seed: int, side: float, turn: int) -> None:
    x, y = surrounding_centre(np.random.default_rng(seed), 0, 0, side, turn, 4)
    assert np.hypot(x, y) <= side / 2
    # Angles go clockwise from the y axis: sector 0 is x >= 0, y >= 0.
    signs = ((1, 1), (1, -1), (-1, -1), (-1, 1))[turn]
    assert x * signs[0] >= 0
    assert y * signs[1] >= 0


def test_von_mises_shares() -> None:
    rng = np.random.default_rng(0)
    for mode, peak in ((0.0, 0.5), (np.pi / 2, 0.75)):
        shares = np.array([von_mises_share(rng, mode) for _ in range(20_000)])
        assert shares.min() >= 0
        assert shares.max() <= 1
        counts, edges = np.histogram(shares, 20)
        assert abs(edges[counts.argmax()] + 0.025 - peak) < 0.08


@given(st.integers(0, 10_000), st.integers(1, 600), st.floats(0.01, 1))
def test_mask_rectangles_stay_in_the_view_and_below_their_ratio(seed: int, size: int, ratio: float) -> None:
    x0, y0, x1, y1 = mask_rectangle(np.random.default_rng(seed), size, ratio, size / 2)
    assert 0 <= x0 <= x1 <= size
    assert 0 <= y0 <= y1 <= size
    assert x1 - x0 <= ratio * size + 2
    assert y1 - y0 <= ratio * size + 2


def test_masked_pixels_belong_to_their_view_alone() -> None:
    maps = [np.array([[0, 1], [2, -1]], np.int32), np.array([[2, 2], [0, 1]], np.int32)]
    kept = np.array([True, False, True])
    masked = [np.array([False, True, False]), np.zeros(3, bool)]
    numbered, count = mutual_regions(maps, kept, masked)
    assert count == 2
    assert numbered.tolist() == [[[0, MASKED], [1, -1]], [[1, 1], [0, -1]]]
