"""Pixels are where the geometry says, and the CPU and GPU renderers agree."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stages.data.images import decode, decode_reduced
from stages.pretrain.views import render_cpu, render_gpu
from stages.pretrain.views.draw import draw_views, generator
from stages.pretrain.views.geometry import apply, crop_affine
from stages.pretrain.views.plan import Draw, Photometric, ViewSpec
from tests.conftest import encode, smooth_pixels

COLOURS = Photometric(
    jitter=(0.4, 0.4, 0.4, 0.2), jitter_p=1.0, gray_p=0.1, blur_p=0.5, blur_sigma=(0.1, 2.0), solarize_p=0.2
)
RECTS = {
    "finer": (10, 20, 154, 160),
    "much finer": (0, 0, 240, 200),
    "coarser": (100, 60, 130, 85),
    "finer across, coarser down": (5, 100, 235, 130),
    "one to one": (32, 32, 96, 96),
    "between pixels, finer": (10.3, 20.7, 154.1, 160.2),
    "between pixels, coarser": (100.25, 60.5, 130.75, 85.3),
    "past the edge": (-40, 30, 120, 260),
}


def ramp(width: int = 240, height: int = 200) -> NDArray[np.uint8]:
    """Red is the column, green is the row: pixels know where they are."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x, y, np.full_like(x, 77)], 2).astype(np.uint8)


def view_of(
    rect: tuple[float, ...], size: int = 64, flip: bool = False, taps: str = "bicubic", **colour: object
) -> Draw:
    return Draw("v", crop_affine(np.array(rect, np.float64), size, flip), size, colour, interpolation=taps)  # type: ignore[arg-type]


def on_gpu(image: NDArray[np.uint8], *draws: Draw, reduced: int = 1) -> NDArray[np.float32]:
    """Through the GPU renderer (on the CPU here, and on a GPU where there is one), beside a larger image."""
    images = [torch.from_numpy(image), torch.zeros(300, 310, 3, dtype=torch.uint8)]
    sizes = [(i.shape[0], i.shape[1]) for i in images]
    views = render_gpu.render(render_gpu.pad(images), sizes, draws, [0] * len(draws), [reduced, 1])
    return views.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("rect", RECTS.values(), ids=RECTS.keys())
def test_pixels_are_where_the_affine_says(rect: tuple[float, ...], flip: bool) -> None:
    item = view_of(rect, flip=flip)
    centers = np.stack(np.meshgrid(np.arange(64) + 0.5, np.arange(64) + 0.5), -1).reshape(-1, 2)
    points = apply(item.affine, centers).reshape(64, 64, 2)
    inside = ((points > 1.5) & (points < [238.5, 198.5])).all(-1)
    crop_edge = 2 if rect == RECTS["coarser"] or rect == RECTS["finer across, coarser down"] else 0
    inside[:crop_edge] = inside[64 - crop_edge :] = False  # a cut-out crop repeats its own edge
    wanted = points - 0.5  # the colour of pixel i stands for its centre
    for view in (render_cpu.cut(ramp(), item), on_gpu(ramp(), item)[0]):
        error = np.abs(view[..., :2].astype(float) - wanted)[inside]
        assert error[:, 1].max() < 1.6
        assert error.mean() < 0.6


def test_past_the_edge_is_black() -> None:
    item = view_of(RECTS["past the edge"])
    for view in (render_cpu.cut(ramp(), item), on_gpu(ramp(), item)[0]):
        assert view[:, :15].max() == 0
        assert view[-15:].max() == 0
        assert view[1:46, 17:, 2].min() > 70


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("rect", RECTS.values(), ids=RECTS.keys())
def test_a_draw_shows_nothing_outside_of_what_it_may(rect: tuple[float, ...], flip: bool) -> None:
    """As if the rest of the image were not there; also decoded at a reduced size, where edges fall between pixels."""
    within = (71, 50, 150, 131)
    item = replace(view_of(rect, flip=flip), within=within)
    red = np.full((200, 240, 3), (255, 0, 0), np.uint8)
    red[within[1] : within[3], within[0] : within[2]] = (0, 90, 0)
    centers = np.stack(np.meshgrid(np.arange(64) + 0.5, np.arange(64) + 0.5), -1).reshape(-1, 2)
    points = apply(item.affine, centers).reshape(64, 64, 2)
    inside = ((points > within[:2]) & (points < within[2:])).all(-1)
    margin = 1.01 * np.abs(item.affine[[0, 1], [0, 1]])
    deep = ((points > within[:2] + margin) & (points < within[2:] - margin)).all(-1)
    for view in (render_cpu.cut(red, item), on_gpu(red, item)[0]):
        assert view[..., 0].max() == 0
        assert view[~inside & ~cv2.dilate(inside.astype(np.uint8), np.ones((3, 3))).astype(bool)].sum() == 0
        assert (np.abs(view[deep].astype(float) - (0, 90, 0)) <= 1).all()
    assert ((render_cpu.cut_labels(red[..., 0], item) == -1) == ~inside).all()
    small = cv2.resize(red, (120, 100), interpolation=cv2.INTER_AREA)
    for view in (render_cpu.cut(small, item, 2), on_gpu(small, item, reduced=2)[0]):
        assert view[..., 0].max() == 0


@pytest.mark.parametrize("taps", ["bilinear", "bicubic"])
@pytest.mark.parametrize("rect", RECTS.values(), ids=RECTS.keys())
def test_renderers_cut_alike(rect: tuple[float, ...], taps: str) -> None:
    """Within a rounding where crops lie on whole pixels (all that the standard draws make)."""
    rng = np.random.default_rng(0)
    image = np.clip(smooth_pixels(240, 200) + rng.normal(0, 20, (200, 240, 3)), 0, 255).astype(np.uint8)
    item = view_of(rect, taps=taps)
    error = np.abs(render_cpu.cut(image, item).astype(float) - on_gpu(image, item)[0])
    whole = all(float(x).is_integer() for x in rect) and min(rect) >= 0
    assert error.max() <= (1.01 if whole else 60)
    assert error.mean() < (0.3 if whole else 5)


def test_colours_agree() -> None:
    """Tolerance: a view differs by 2.5 grey levels on average and 99 % of its values by at most 12 (on the CPU every
    operation rounds to 8 bits, and hue has 256 steps a turn)."""
    image = smooth_pixels(240, 200, 3)
    spec = ViewSpec("v", 64, 40, (0.2, 1.0), flip_p=0.5, photometric=COLOURS)
    draws = draw_views([spec], generator(0, 0, 0, 0), 240, 200)
    theirs = on_gpu(image, *draws)
    means = []
    for item, gpu in zip(draws, theirs, strict=True):
        error = np.abs(render_cpu.render(image, item).astype(float) - gpu)
        means.append(error.mean())
        assert error.mean() < 2.5, item.colour
        assert np.quantile(error, 0.99) <= 12, item.colour
    assert np.mean(means) < 1.0


@pytest.mark.parametrize(
    ("colour", "slow"),
    [
        ({"order": ("brightness",), "brightness": 1.3}, lambda v: v * 1.3),
        ({"order": ("contrast",), "contrast": 0.6}, lambda v: v * 0.6 + 0.4 * (v @ render_cpu.GRAY).mean()),
        ({"order": ("saturation",), "saturation": 1.4}, lambda v: v * 1.4 - 0.4 * (v @ render_cpu.GRAY)[..., None]),
        ({"gray": True}, lambda v: np.repeat((v @ render_cpu.GRAY)[..., None], 3, 2)),
        ({"solarize": 0.5}, lambda v: np.where(v >= 127.5, 255 - v, v)),
    ],
)
def test_colour_operations_equal_the_obvious_formula(colour: dict[str, object], slow: object) -> None:
    image = smooth_pixels(64, 64, 1)
    item = view_of((0, 0, 64, 64), **colour)
    expected = np.clip(slow(image.astype(float)), 0, 255)  # type: ignore[operator]
    for view in (render_cpu.render(image, item), on_gpu(image, item)[0]):
        assert np.abs(view - expected).max() <= 1.01


def test_hue_turns_red_to_green() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[..., 0] = 200
    item = view_of((0, 0, 64, 64), order=("hue",), hue=1 / 3)
    for view in (render_cpu.render(image, item), on_gpu(image, item)[0]):
        assert np.abs(view[0, 0].astype(float) - [0, 200, 0]).max() <= 4


@pytest.mark.parametrize("reduced", [2, 4, 8])
def test_reduced_decoding_keeps_the_geometry(reduced: int) -> None:
    data = encode(np.repeat(np.repeat(ramp(), 5, 0), 5, 1), quality=95)
    item = view_of((0, 0, 64 * reduced, 80 * reduced) if reduced < 8 else (160, 0, 672, 640), size=64)
    pixels, got = decode_reduced(data, reduced)
    assert got == reduced
    small, full = render_cpu.cut(pixels, item, reduced), render_cpu.cut(decode(data), item)
    assert np.abs(small.astype(int) - full.astype(int)).max() <= 6
    assert np.abs(small.astype(int) - full.astype(int)).mean() < 1
    assert np.abs(on_gpu(pixels, item, reduced=reduced)[0] - small).max() <= 1.01


@pytest.mark.parametrize("flip", [False, True])
def test_labels_are_nearest_and_minus_one_outside(flip: bool) -> None:
    labels = np.arange(200 * 240, dtype=np.int64).reshape(200, 240) // 7
    item = view_of((-32, 10, 96, 138), size=64, flip=flip)
    got = render_cpu.cut_labels(labels, item)
    columns = np.arange(64) * 2 + 1 - 32
    wanted = labels[np.arange(64) * 2 + 11][:, np.clip(columns, 0, 239)].copy()
    wanted[:, columns < 0] = -1
    np.testing.assert_array_equal(got, wanted[:, ::-1] if flip else wanted)
