"""bbox-aligned k-NN: patches lie where the image's own crop shows the object; any token may be right."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.evaluate.bbox_knn_votes import best_places, object_patches
from stages.models.inference import centre_square


@pytest.mark.parametrize(("width", "height"), [(640, 427), (300, 500), (224, 224), (90, 400)])
def test_patches_are_where_the_crop_shows_the_box(width: int, height: int) -> None:
    rng = np.random.default_rng(width)
    for _ in range(10):
        side = 0.4 * min(width, height)
        x, y = width / 2 + rng.uniform(-0.2, 0.0) * side, height / 2 + rng.uniform(-0.2, 0.0) * side
        box = np.array([x, y, x + side, y + side])
        pixels = np.zeros((height, width, 3), np.uint8)
        x0, y0, x1, y1 = box.round().astype(int)
        pixels[y0:y1, x0:x1] = 255
        found = object_patches(box[None], width, height)
        assert found is not None
        shown = centre_square(pixels, 256, 224).reshape(14, 16, 14, 16, 3).mean(axis=(1, 3, 4))
        assert len(set(found[1].tolist())) == 9
        assert (shown.ravel()[found[1]] > 60).all()


def test_the_largest_box_is_the_largest_after_clipping() -> None:
    boxes = np.array([[0, 0, 240, 400], [300, 150, 380, 230]])  # of the first, the crop shows 15 columns
    found = object_patches(boxes, 800, 400)
    assert found is not None
    assert found[0] == 1
    assert object_patches(np.array([[0, 0, 220, 400]]), 800, 400) is None
    assert object_patches(np.zeros((0, 4)), 800, 400) is None


def test_a_box_at_the_edge_stays_inside_the_grid() -> None:
    found = object_patches(np.array([[250.0, 250.0, 400.0, 400.0]]), 256, 256, official_geometry=True)
    assert found is not None
    assert found[1].max() == 14 * 14 - 1


def test_an_image_is_right_if_any_of_its_tokens_is() -> None:
    eye = torch.eye(3)
    train, labels = eye[:, None].expand(3, 2, 3), torch.arange(3)
    test = torch.stack([eye[[0, 1]], eye[[1, 1]]])
    places = best_places(train, labels, test, torch.tensor([0, 0]), classes=3, k=2)
    assert places[0] == 0
    assert places[1] > 0
    with pytest.raises(ValueError, match="k is 7"):
        best_places(train, labels, test, torch.tensor([0, 0]), classes=3, k=7)
