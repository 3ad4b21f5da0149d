"""FLSL's k-NN on the patches of an image's largest object. Pure functions.

Source: docs/methods.md#bbox-aligned-k-nn.

Shape legend: N boxes of an image, M train and B test images, G cells of the grid over a box, D width, K neighbours.
"""

from __future__ import annotations

import numpy as np
import torch.nn.functional as functional
from numpy.typing import NDArray
from torch import Tensor

from stages.evaluate.weighted_knn import nearest, ranks, votes


def object_patches(
    boxes_N4: NDArray[np.float64],
    width: int,
    height: int,
    *,
    resize: int = 256,
    crop: int = 224,
    patch: int = 16,
    grid: int = 3,
    official_geometry: bool = False,
) -> tuple[int, NDArray[np.int64]] | None:
    """The largest box in the central crop, and the patches under the centres of a grid over it.

    Areas are compared after clipping to the crop; of equal boxes the first counts.

    Args:
        boxes_N4: x0, y0, x1, y1 in pixels of the stored image.
        width: of the stored image in pixels.
        height: of the stored image in pixels.
        resize: short side in pixels of the image before the central crop (`inference.centre_square`).
        crop: side of the crop in pixels.
        patch: side of a patch in pixels.
        grid: cells along a side of the grid over the box.
        official_geometry: FLSL's own mapping, which scales x and y apart as if the image became a square and so
            misplaces boxes of images that are not. For comparison with its numbers only.

    Returns: the box's index and (grid^2,) raster indices of patches, row by row; None if no box reaches into the crop.
    """
    boxes_N4 = np.asarray(boxes_N4, np.float64).reshape(-1, 4)
    if official_geometry:
        resized = np.array([resize, resize])
        corner = np.full(2, (resize - crop) // 2)
    else:
        scale = resize / min(width, height)
        resized = np.maximum(crop, np.array([round(width * scale), round(height * scale)]))
        corner = (resized - crop) // 2
    factor = np.tile(resized / np.array([width, height]), 2)
    inside_N4 = np.clip(boxes_N4 * factor - np.tile(corner, 2), 0, crop) / patch
    areas_N = (inside_N4[:, 2] - inside_N4[:, 0]) * (inside_N4[:, 3] - inside_N4[:, 1])
    if not len(areas_N) or (areas_N.max() <= 0 and not official_geometry):
        return None
    largest = int(areas_N.argmax())
    x0, y0, x1, y1 = inside_N4[largest]
    middle = (np.arange(grid) + 0.5) / grid
    side = crop // patch
    columns = np.minimum(np.floor(x0 + middle * (x1 - x0)), side - 1).astype(np.int64)
    rows = np.minimum(np.floor(y0 + middle * (y1 - y0)), side - 1).astype(np.int64)
    return largest, (rows[:, None] * side + columns).ravel()


def best_places(
    train_MGD: Tensor,
    train_labels_M: Tensor,
    test_BGD: Tensor,
    test_labels_B: Tensor,
    *,
    classes: int,
    k: int = 140,
    temperature: float = 0.07,
) -> Tensor:
    """The best place of each image's class among the votes of its tokens, (B,), 0 = first.

    Every test token asks its k nearest train tokens, each labelled as its image; an image counts as right at top-n if
    the class is among the first n of any of its tokens: `accuracy(best_places(...), n)`. (The released top-5 counts an
    image once for every column of ranks, and so exceeds 100 %.)

    Args:
        train_MGD: tokens of the train images.
        train_labels_M: their class indices.
        test_BGD: tokens of the test images.
        test_labels_B: their class indices.
        classes: number of classes.
        k: neighbours that vote; the paper's 20 times 7, its estimate of how many tokens of a box are one object's.
        temperature: a neighbour's vote weighs exp(cosine / temperature).

    Raises: ValueError if there are fewer than k train tokens.
    """
    train_ND, test_ND = (functional.normalize(tokens.flatten(0, 1), dim=1) for tokens in (train_MGD, test_BGD))
    similarity, rows = nearest(train_ND, test_ND, k)
    given = votes(similarity, train_labels_M[rows // train_MGD.shape[1]], classes, temperature)
    places = ranks(given, test_labels_B.repeat_interleave(test_BGD.shape[1]))
    return places.reshape(test_BGD.shape[:2]).amin(dim=1)
