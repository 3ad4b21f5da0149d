"""Region-level draws, as rules that hold for any boxes, and their painting against slow, obvious loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.pretrain.methods.d3ssl.proposals import (
    common_shift,
    context_rectangles,
    jittered,
    proposal_cutout,
    random_cutout,
    whole_boxes,
)
from stages.pretrain.methods.d3ssl.region_masks import compose, kept, painted, union

SIZE = 48
SEEDS = st.integers(0, 2**32 - 1)


def boxes_of(rng: np.random.Generator, count: int = 4, least: float = 1.0) -> np.ndarray:
    sides = least + rng.random((count, 2)) * (SIZE - least)
    low = rng.random((count, 2)) * (SIZE - sides)
    return np.concatenate([low, low + sides], 1)


def painted_by_hand(operations: np.ndarray) -> np.ndarray:
    mask = np.ones((SIZE, SIZE), bool)
    for i, (x0, y0, x1, y1) in enumerate(operations.tolist()):
        mask[y0:y1, x0:x1] = i % 2 == 0
    return mask


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from([None, 0.1, 0.5]))
def test_cutout_keeps_to_its_rules(seed: int, threshold: float | None) -> None:
    rng = np.random.default_rng(seed)
    boxes = whole_boxes(boxes_of(rng), SIZE)
    draws = np.column_stack([0.2 + 0.3 * rng.random(4), rng.random((4, 2))])
    operations = proposal_cutout(boxes, draws, SIZE, threshold)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    mask = np.ones((SIZE, SIZE), bool)
    for n, k in enumerate(np.argsort(-areas, kind="stable")):
        (x0, y0, x1, y1), ratio = boxes[k], draws[k, 0]
        mine, (restore, cut) = mask[y0:y1, x0:x1], operations[2 * n : 2 * n + 2]
        covered = 1 - mine.mean()
        assert (covered > (ratio if threshold is None else threshold)) == restore.any()
        if restore.any():
            assert restore.tolist() == boxes[k].tolist()
            mine[:], covered = True, 0.0
        a0, b0, a1, b1 = cut
        mask[b0:b1, a0:a1] = False
        if cut.any():
            assert x0 <= a0 < a1 <= x1
            assert y0 <= b0 < b1 <= y1
            # No more than asked for, up to the rounding of both sides.
            assert (a1 - a0 - 0.5) * (b1 - b0 - 0.5) <= (ratio - covered) * areas[k] + 1e-9
    np.testing.assert_array_equal(mask, painted_by_hand(operations))
    np.testing.assert_array_equal(kept(torch.from_numpy(operations)[None], SIZE)[0], mask)


def test_a_repeated_box_is_cut_to_the_larger_ratio_at_most() -> None:
    box = np.tile([8, 8, 40, 40], (2, 1))
    same = proposal_cutout(box, np.array([[0.3, 0.2, 0.2], [0.3, 0.9, 0.9]]), SIZE)
    assert same[1].any()
    assert 1 - painted_by_hand(same)[8:40, 8:40].mean() == pytest.approx(0.3, abs=0.03)


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_random_squares_are_cut_from_half_of_the_boxes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    boxes = whole_boxes(boxes_of(rng, 16, least=12), SIZE)
    draws = rng.random((16, 4))
    operations = random_cutout(boxes, draws, SIZE)
    assert not operations[::2].any()
    assert (operations >= 0).all()
    assert (operations <= SIZE).all()
    assert ((operations[1::2] > 0).any(1) == (draws[:, 0] < 0.5)).all()


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from(["restricted", "contained", "plain", "none"]))
def test_jitter_stays_in_its_bounds(seed: int, how: str) -> None:
    rng = np.random.default_rng(seed)
    boxes = boxes_of(rng, 30)
    out = jittered(boxes, rng.random((30, 4)), SIZE, 0.1, how)  # type: ignore[arg-type]
    wh, new = boxes[:, 2:] - boxes[:, :2], out[:, 2:] - out[:, :2]
    assert (out >= 0).all()
    assert (out <= SIZE).all()
    assert (new > 0).all()
    if how in ("restricted", "contained"):
        assert (new <= wh + 1e-9).all()
    if how == "plain":
        assert (new > wh).any()
    if how == "contained":
        assert (out[:, :2] >= boxes[:, :2] - 1e-9).all()
        assert (out[:, 2:] <= boxes[:, 2:] + 1e-9).all()
    if how == "none":
        np.testing.assert_array_equal(out, boxes)
    centre = np.abs((out[:, 2:] + out[:, :2]) - (boxes[:, 2:] + boxes[:, :2])) / 2
    assert (centre <= 0.15 * wh + 1e-9).all()


def test_restricted_jitter_shrinks_and_shifts_by_what_is_drawn() -> None:
    out = jittered(np.array([[10.0, 10, 30, 20]]), np.array([[0.5, 0.0, 1.0, 0.0]]), SIZE, 0.1, "restricted")
    np.testing.assert_allclose(out, [[12.5, 9, 31.5, 19]])


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_shifts_keep_all_boxes_inside_and_reach_both_ends(seed: int) -> None:
    rng = np.random.default_rng(seed)
    boxes = whole_boxes(boxes_of(rng), SIZE)
    for draws in (np.zeros(2), rng.random(2), np.full(2, 1 - 1e-12)):
        moved = boxes + np.tile(common_shift(boxes, draws, SIZE), 2)
        assert (moved >= 0).all()
        assert (moved <= SIZE).all()
    assert (boxes + np.tile(common_shift(boxes, np.zeros(2), SIZE), 2))[:, :2].min(0).tolist() == [0, 0]
    assert (boxes + np.tile(common_shift(boxes, np.full(2, 1 - 1e-12), SIZE), 2))[:, 2:].max(0).tolist() == [SIZE] * 2


def test_context_rectangles_sit_on_the_edge_with_the_drawn_area() -> None:
    box = np.array([[16, 18, 28, 30]])
    right = context_rectangles(box, np.array([[0.5, 0.5, 0.0]]), SIZE, (0.2, 0.6), (0.75, 4 / 3))
    # Area 0.4 * 144 and aspect 1: a side of 7.59, centred on the middle of the right edge, (28, 24).
    np.testing.assert_array_equal(right, [[24, 20, 32, 28]])
    down = context_rectangles(box, np.array([[0.5, 0.5, 0.25]]), SIZE, (0.2, 0.6), (0.75, 4 / 3))
    np.testing.assert_array_equal(down, [[18, 26, 26, 34]])
    clipped = context_rectangles(np.array([[0, 0, 48, 48]]), np.array([[0.9, 0.5, 0.5]]), SIZE, (0.2, 0.6), (1.0, 1.0))
    assert clipped[0, 0] == 0
    assert clipped[0, 2] < 24


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_whole_boxes_have_pixels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    boxes = boxes_of(rng, 20, least=0.01)
    whole = whole_boxes(boxes, SIZE)
    assert (whole[:, 2:] > whole[:, :2]).all()
    assert (whole >= 0).all()
    assert (whole <= SIZE).all()
    assert (np.abs(whole - boxes) < 1.5).all()  # the last pixel for what is thinner than one


def test_painting_and_pasting_equal_the_loops() -> None:
    rng = np.random.default_rng(0)
    rectangles = whole_boxes(boxes_of(rng, 15), SIZE).reshape(3, 5, 4)
    rectangles[1, 2] = 0  # an empty one paints nothing
    by_hand = np.zeros((3, 5, SIZE, SIZE), bool)
    for b in range(3):
        for r in range(5):
            x0, y0, x1, y1 = rectangles[b, r]
            by_hand[b, r, y0:y1, x0:x1] = True
    as_sent = torch.from_numpy(rectangles.astype(np.int16))  # as the loader sends them
    np.testing.assert_array_equal(painted(as_sent, SIZE), by_hand)
    np.testing.assert_array_equal(union(as_sent, SIZE), by_hand.any(1))

    image, background = torch.randn(3, 3, SIZE, SIZE), torch.randn(3, 3, SIZE, SIZE)
    mask, shift = torch.zeros(3, SIZE, SIZE, dtype=torch.bool), torch.tensor([[3, -4], [-2, 0], [0, 5]])
    mask[:, 6:40, 5:41] = torch.rand(3, 34, 36) < 0.7
    pasted = compose(image, background, mask, shift)
    for b, (dx, dy) in enumerate(shift.tolist()):
        for y, x in mask[b].nonzero().tolist():
            assert torch.equal(pasted[b, :, y, x], image[b, :, y - dy, x - dx])
        assert torch.equal(pasted[b][:, ~mask[b]], background[b][:, ~mask[b]])
