"""Pictures: what is drawn is where it belongs, sheets have the size they promise, and odd input draws too."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from stages.data import pictures
from stages.data.images import decode


def plain(height: int, width: int, grey: int = 128) -> np.ndarray:
    return np.full((height, width, 3), grey, np.uint8)


def test_a_box_is_drawn_where_it_is() -> None:
    drawn = pictures.draw_boxes(plain(100, 200), np.array([[50, 25, 150, 75]], np.float32), side=400)
    assert drawn.shape == (200, 400, 3)
    changed = np.argwhere((drawn != 128).any(2))
    assert changed.min(0).tolist() == [50, 100]
    assert changed.max(0).tolist() == [149, 299]
    assert (drawn[60:140, 110:290] == 128).all()


def test_boxes_of_no_size_or_outside_are_no_error() -> None:
    boxes = np.array([[5, 5, 5, 5], [-10, -10, 500, 500], [0, 0, 1, 1]], np.float32)
    pictures.draw_boxes(plain(20, 30), boxes, ["a", "", "Ž"])
    pictures.draw_boxes(plain(20, 30), np.zeros((0, 4), np.float32))


def test_borders_of_superpixels() -> None:
    labels = np.zeros((10, 20), np.uint16)
    labels[:, 10:] = 1
    drawn = pictures.draw_superpixels(plain(10, 20), labels, side=200, colour=(255, 0, 0))
    red = (drawn == (255, 0, 0)).all(2)
    assert red.sum(1).tolist() == [1] * 100
    assert red[:, 100].all()


def test_a_sheet_holds_every_picture() -> None:
    images = [plain(40, 80, 10 * i) for i in range(5)]
    sheet = decode(pictures.grid(images, 2, [f"number {i}" for i in range(5)], cell=80, title="Five"))
    assert sheet.shape[1] == 2 * 20 + 2 * 80 + 12
    for grey in range(0, 50, 10):
        assert (sheet == grey).all(2).sum() >= 40 * 80
    smaller = decode(pictures.grid(images, 2, cell=80))
    assert smaller.shape[0] < sheet.shape[0]
    with pytest.raises(ValueError, match="at least one picture"):
        pictures.grid([])


def test_a_legend_shows_its_colours() -> None:
    legend = [(f"a class with a name {i}", colour) for i, colour in enumerate(pictures.class_colours(12))]
    sheet = decode(pictures.grid([plain(50, 50)], 1, cell=300, legend=legend))
    for _, colour in legend:
        assert (sheet == colour).all(2).sum() > 80


def test_neighbours_stand_in_a_row() -> None:
    sheet = decode(
        pictures.neighbor_strip(
            [plain(30, 60, 10), plain(60, 30, 20)],
            [[plain(9, 9, 30)] * 3, [plain(9, 9, 40)]],
            [["0.9"] * 3, ["0.8"]],
            cell=50,
        )
    )
    assert (sheet == 30).all(2).sum() == 3 * 50 * 50
    assert (sheet == 40).all(2).sum() == 50 * 50
    assert np.argwhere((sheet == 10).all(2)).max() < np.argwhere((sheet == 30).all(2))[:, 1].min()


def test_classes_have_their_colours_and_void_is_black() -> None:
    colours = pictures.class_colours(3)
    mask = np.array([[0, 1, 2], [255, 1, 3]], np.uint8)
    shown = pictures.colour_mask(mask, ["a", "b", "c"], ignore_index=1)
    assert shown[0].tolist() == [list(colours[0]), [0, 0, 0], list(colours[2])]
    assert shown[1].tolist() == [[0, 0, 0]] * 3
    over = pictures.colour_mask(mask, 3, image=plain(2, 3, 200), opacity=0.5)
    assert over[1, 0].tolist() == [100, 100, 100]
    assert len(set(pictures.class_colours(80))) == 80


def test_the_colours_of_a_whole_legend_can_be_told_apart() -> None:
    """In CIE Lab, where a distance of 2.3 can just be seen."""
    import cv2

    colours = np.array([*pictures.class_colours(pictures.LEGEND), (0, 0, 0)], np.float32)[None] / 255  # void is black
    lab = cv2.cvtColor(colours, cv2.COLOR_RGB2Lab)[0]
    apart = np.linalg.norm(lab[:, None] - lab[None], axis=2)
    assert apart[~np.eye(len(lab), dtype=bool)].min() > 15


def test_a_legend_of_30_classes_is_whole_and_a_longer_one_says_what_is_left_out() -> None:
    names = [(f"class {i}", colour) for i, colour in enumerate(pictures.class_colours(32))]
    whole, long = (decode(pictures.grid([plain(50, 50)], 1, cell=300, legend=legend)) for legend in (names[:30], names))

    def shown(sheet: NDArray[np.uint8]) -> list[bool]:
        return [bool((sheet == colour).all(2).any()) for _, colour in names]

    assert shown(whole) == shown(long) == [True] * 30 + [False] * 2
    assert (long.shape[0] - whole.shape[0]) in (0, 24)
    assert (long[-30:] != 255).any(), "the number of classes that are left out"


def test_principal_components_separate_what_differs() -> None:
    rng = np.random.default_rng(0)
    maps = rng.normal(0, 0.01, (2, 6, 4, 4))
    maps[:, 0, :, 2:] += 5  # two halves
    first, second = pictures.pca_colours(maps)
    assert first.shape == (4, 4, 3)
    assert abs(int(first[0, 0, 0]) - int(first[0, 3, 0])) > 200
    assert np.abs(first[..., 0].astype(int) - second[..., 0]).max() < 30
    assert pictures.pca_colours(maps[:, :2], side=64)[0].shape == (64, 64, 3)


def test_no_picture_of_components_is_all_one_colour() -> None:
    """Two pictures that differ far more from each other than their patches do, as a dark and a bright photograph."""
    rng = np.random.default_rng(0)
    maps = rng.normal(0, 0.01, (2, 8, 6, 6))
    maps[1] += 100 * rng.normal(0, 1, (8, 1, 1))
    maps[:, 3, :, 3:] += 0.5
    for picture in pictures.pca_colours(maps):
        assert picture.reshape(-1, 3).std(0).min() > 30
        assert abs(int(picture[0, 0, 0]) - int(picture[0, 5, 0])) > 150  # and the halves still differ
    flat = pictures.pca_colours(np.ones((1, 8, 6, 6)))[0]
    assert (flat == 128).all()  # equal patches: nothing to show


def test_a_single_value_is_text_and_not_a_plot_of_one_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: list[int] = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, x, *rest, **how: drawn.append(len(x)) or plot(self, x, *rest, **how))
    many = pictures.curves({"a": [(1, 2.0), (2, 3.0)], "b": [(1, 0.5)]})
    alone = pictures.curves({"b": [(1, 0.5)]}, title="Terms")
    assert drawn == [2]
    assert decode(many).shape[0] > decode(alone).shape[0] > 50
    assert (decode(alone) < 128).any()


def test_curves() -> None:
    series = {
        "term": [(i, 1 / (i + 1)) for i in range(10)],
        "one point": [(0, 1.0)],
        "nan": [(0, float("nan")), (1, 1.0)],
    }
    assert decode(pictures.curves(series, title="Terms")).shape[1] > 900
    with pytest.raises(ValueError, match="no curve"):
        pictures.curves({})


def test_histograms() -> None:
    samples = {"near": np.array([0.9, 0.8, 0.95], np.float32), "far": np.linspace(-1, 1, 50)}
    sheet = decode(pictures.histograms(samples, title="Similarity", label="cosine"))
    assert sheet.shape[1] > 700
    assert (sheet != 255).any(2).mean() > 0.02, "something is drawn"
    pictures.histograms({"all the same": np.ones(4)}, title="One value", label="cosine")
