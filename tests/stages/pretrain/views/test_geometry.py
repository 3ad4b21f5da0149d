"""Views and the image they come from: there and back is the identity, and overlaps show the same points."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import roi_align

from stages.pretrain.views import geometry
from stages.pretrain.views.draw import draw_views, generator
from stages.pretrain.views.plan import ViewSpec

SIDES = st.integers(20, 4000)


@st.composite
def views(draw: Any, count: int, nested: bool = False) -> tuple[list[np.ndarray], list[int]]:
    """`count` affines of one image with their sizes, flips included; each nested in the first one if asked."""
    width, height = draw(SIDES), draw(SIDES)
    sizes = [draw(st.sampled_from([32, 96, 224])) for _ in range(count)]
    specs = [
        ViewSpec(f"v{i}", size, scale=(0.2, 1.0), flip_p=0.5, parent="v0" if nested and i else None)
        for i, size in enumerate(sizes)
    ]
    draws = draw_views(specs, generator(draw(st.integers(0, 10**6)), 0, 0, 0), width, height)
    return [item.affine for item in draws], sizes


@given(views(1), st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=9))
def test_view_to_image_and_back_is_the_identity(view: Any, at: list[tuple[float, float]]) -> None:
    (affine,), (size,) = view
    points = np.array(at) * size
    there = geometry.apply(affine, points)
    np.testing.assert_allclose(geometry.apply(geometry.invert(affine), there), points, atol=1e-9)
    x0, y0, x1, y1 = geometry.rectangle(affine, size)
    assert ((there >= np.array([x0, y0]) - 1e-6) & (there <= np.array([x1, y1]) + 1e-6)).all()


@given(views(1), st.tuples(*[st.floats(0, 1)] * 4))
def test_boxes_go_there_and_back(view: Any, at: tuple[float, ...]) -> None:
    (affine,), (size,) = view
    a = np.array(at) * size
    box = np.concatenate([np.minimum(a[:2], a[2:]), np.maximum(a[:2], a[2:])])
    np.testing.assert_allclose(geometry.to_view(geometry.to_image(box, affine), affine), box, atol=1e-9)


@given(views(2))
def test_compose_is_one_after_the_other(view: Any) -> None:
    (outer, inner), _ = view
    points = np.array([[0.0, 0.0], [3.5, 100.0]])
    expected = geometry.apply(outer, geometry.apply(inner, points))
    np.testing.assert_allclose(geometry.apply(geometry.compose(outer, inner), points), expected, rtol=1e-9)


def coordinates(affine: np.ndarray, size: int) -> Tensor:
    """(1, 2, size, size): a view of an image whose pixels are their own coordinates."""
    centers = np.stack(np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5), -1).reshape(-1, 2)
    return torch.from_numpy(geometry.apply(affine, centers)).T.reshape(1, 2, size, size)


def aligned(affine: np.ndarray, size: int, box: Tensor, bins: int = 7) -> Tensor:
    regions = roi_align(coordinates(affine, size), geometry.roi_rows(box[None]), bins, aligned=True)
    return geometry.unmirror(regions, geometry.flipped(torch.from_numpy(affine))[None])[0]


def check_same_points(affines: list[np.ndarray], sizes: list[int]) -> None:
    a, b = (torch.from_numpy(affine) for affine in affines)
    box_a, box_b, valid = geometry.overlap(a, b, *sizes)
    assume(bool(valid) and min((box[2:] - box[:2]).min() for box in (box_a, box_b)) > 1)
    for box, size in ((box_a, sizes[0]), (box_b, sizes[1])):
        assert (box >= 0).all()
        assert (box <= size).all()
    points_a, points_b = aligned(affines[0], sizes[0], box_a), aligned(affines[1], sizes[1], box_b)
    # RoIAlign repeats a map's outermost half pixel: bins there may be off by up to that, all others are exact.
    slack = 0.5 * sum(np.abs(affine[[0, 1], [0, 1]]) for affine in affines)
    assert ((points_a - points_b).abs() <= torch.from_numpy(slack)[:, None, None] + 1e-6).all()
    inner = slice(3, 4)
    if min((box[2:] - box[:2]).min() for box in (box_a, box_b)) > 2:
        torch.testing.assert_close(points_a[:, inner, inner], points_b[:, inner, inner], rtol=0, atol=1e-6)
        common, _ = geometry.intersect(geometry.rectangle(a, sizes[0]), geometry.rectangle(b, sizes[1]))
        torch.testing.assert_close(points_a[:, 3, 3], (common[:2] + common[2:]) / 2, rtol=0, atol=1e-6)


@given(views(2))
def test_roi_align_of_the_overlap_shows_the_same_points(view: Any) -> None:
    check_same_points(*view)


@given(views(3, nested=True))
def test_roi_align_of_nested_crops_shows_the_same_points(view: Any) -> None:
    affines, sizes = view
    check_same_points(affines[::2], sizes[::2])
    check_same_points(affines[1:], sizes[1:])


@given(views(2), st.sampled_from([7, 14]))
def test_correspondence_finds_the_same_points(view: Any, steps: int) -> None:
    affines, sizes = view
    a, b = (torch.from_numpy(affine)[None] for affine in affines)
    grid, inside = geometry.correspondence(a, b, sizes[0], sizes[1], steps)
    seen = torch.nn.functional.grid_sample(
        coordinates(affines[1], sizes[1]), grid, align_corners=False, padding_mode="border"
    )[0]
    cell = sizes[0] / steps
    centers = (np.arange(steps) + 0.5) * cell
    points = geometry.apply(affines[0], np.stack(np.meshgrid(centers, centers), -1).reshape(-1, 2))
    wanted = torch.from_numpy(points).T.reshape(2, steps, steps)
    slack = torch.from_numpy(0.5 * np.abs(affines[1][[0, 1], [0, 1]]))[:, None, None] + 1e-6
    assert ((seen - wanted).abs() <= slack)[:, inside[0]].all()
    rect = geometry.rectangle(b, sizes[1])[0]
    within = ((wanted >= rect[:2, None, None] - 1e-6) & (wanted <= rect[2:, None, None] + 1e-6)).all(0)
    assert (inside[0] <= within).all()


def test_disjoint_views_have_no_overlap() -> None:
    a = geometry.crop_affine(torch.tensor([[0.0, 0, 10, 10]]), 32)
    b = geometry.crop_affine(torch.tensor([[20.0, 5, 40, 15]]), 32, flip=True)
    box_a, box_b, valid = geometry.overlap(a, b, 32, 32)
    assert not valid.any()
    for box in (box_a, box_b):
        assert ((box >= 0) & (box <= 32)).all()
        assert geometry.area(box) == 0


def test_boxes_are_clipped_mirrored_and_judged() -> None:
    boxes = np.array([[0.0, 0, 60, 50], [45, 45, 55, 55], [0, 0, 10, 10], [79.9, 20, 200, 30]])
    plain = geometry.crop_affine(np.array([40.0, 40, 80, 80]), 80)
    mirrored = geometry.crop_affine(np.array([40.0, 40, 80, 80]), 80, flip=True)
    got, valid = geometry.clip_to_view(boxes, plain, 80)
    np.testing.assert_allclose(got[:2], [[0, 0, 40, 20], [10, 10, 30, 30]])
    assert valid.tolist() == [True, True, False, False]  # outside; a fifth of a pixel is left
    got, valid = geometry.clip_to_view(boxes, mirrored, 80)
    np.testing.assert_allclose(got[:2], [[40, 0, 80, 20], [50, 10, 70, 30]])
    assert valid.tolist() == [True, True, False, False]
    per_image, _ = geometry.clip_to_view(torch.from_numpy(boxes)[None], torch.from_numpy(mirrored)[None, None], 80)
    np.testing.assert_allclose(per_image[0].numpy(), got)


def test_feature_boxes_and_rows() -> None:
    boxes = torch.tensor([[[16.0, 32, 48, 64]], [[0, 0, 224, 224]]])
    rows = geometry.roi_rows(geometry.feature_boxes(boxes, 16))
    assert rows.tolist() == [[0, 1, 2, 3, 4], [1, 0, 0, 14, 14]]
