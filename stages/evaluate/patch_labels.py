"""Patches of train images with the classes of their pixels, drawn once and standardised, for classifiers of patches.

Source: docs/methods.md#dense-classifiers.

Shape legend: N patches, D width, C classes, h w grid of an image's patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.stage import Context
from stages.data.confusion import Matrix
from stages.data.mask_classes import MaskClasses, MaskLabels
from stages.evaluate.in_context import CELL, cell_labels
from stages.evaluate.stored_features import iter_masked, require_some


@dataclass(frozen=True)
class Patches:
    """Patches and what their pixels are."""

    vectors: Tensor  # (N, D) float32
    pixels: Tensor  # (N, C + 1) int16, how many of a patch's pixels are of each class; the last: void

    @cached_property
    def labels(self) -> Tensor:
        """The most frequent class of each patch, (N,); of equally frequent ones the first, C for void."""
        return self.pixels.argmax(dim=1)

    def standardised(self, mean_D: Tensor, deviation_D: Tensor) -> Patches:
        """The same with each channel brought to another mean and deviation."""
        return Patches((self.vectors - mean_D) / deviation_D, self.pixels)

    def labelled(self) -> Patches:
        """Without those that are mostly void."""
        rows = self.labels < self.pixels.shape[1] - 1
        return Patches(self.vectors[rows], self.pixels[rows])

    def joined(self, other: Patches) -> Patches:
        """These and others."""
        return Patches(torch.cat([self.vectors, other.vectors]), torch.cat([self.pixels, other.pixels]))

    def matrix(self, predictions_N: Tensor) -> Matrix:
        """The confusion matrix over the patches' pixels, if every pixel gets the class of its patch."""
        classes = self.pixels.shape[1] - 1
        by_prediction = torch.zeros(classes, classes, dtype=torch.int64)
        by_prediction.index_add_(0, predictions_N, self.pixels[:, :classes].long())
        return by_prediction.T.numpy()


def draw_patches(
    context: Context,
    classes: MaskClasses,
    ids: Sequence[int],
    most: int,
    seed: int,
    problems: list[dict[str, str]],
    report: Callable[[int], None],
) -> Patches:
    """The patches of some images, or the same number of each, drawn at random, where these would be more than `most`.

    Args:
        context: of the stage; its inputs are `images` and `features`.
        classes: of the masks.
        ids: of the images.
        most: patches in all.
        seed: of the draws.
        problems: grows by an entry for each image that cannot be used.
        report: called with the number of images read so far.

    Raises: SourceError where none can be used.
    """
    each = max(1, most // len(ids))
    vectors, pixels = [], []
    source = iter_masked(context.inputs["images"], context.inputs["features"], classes, set(ids), problems)
    for done, image in enumerate(source, 1):
        count = image.map.shape[0] * image.map.shape[1]
        rows = np.arange(count)
        if count > each:
            rows = np.sort(np.random.default_rng((seed, image.image_id)).permutation(count)[:each])
        vectors.append(torch.from_numpy(image.map.reshape(count, -1)[rows]))
        pixels.append(class_pixels(image.labels, image.map.shape[:2], len(classes.names))[rows])
        report(done)
    require_some(context.name, len(vectors), f"{len(ids)} train", problems)
    return Patches(torch.cat(vectors), torch.cat(pixels))


def class_pixels(labels_HW: MaskLabels, grid: tuple[int, ...], classes: int) -> Tensor:
    """Of each patch, how many of its pixels are of each class, the last column void: (h w, C + 1) int16."""
    height, width = grid
    labels = cell_labels(labels_HW, height, width).long()
    labels = torch.where(labels < 0, classes, labels)
    patches_NS = labels.reshape(height, CELL, width, CELL).transpose(1, 2).reshape(height * width, -1)
    counts = torch.zeros(len(patches_NS), classes + 1, dtype=torch.int16)
    return counts.scatter_add_(1, patches_NS, torch.ones(1, dtype=torch.int16).expand(patches_NS.shape))


def scale(patches: Patches) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel; a constant channel has the deviation 1."""
    mean_D, deviation_D = patches.vectors.mean(dim=0), patches.vectors.std(dim=0, correction=0)
    return mean_D, torch.where(deviation_D > 0, deviation_D, 1.0)


def enlarged(found_hw: NDArray[np.int64], shape: tuple[int, ...]) -> NDArray[np.int64]:
    """The class of each pixel, that of its patch."""
    import cv2

    size = (shape[1], shape[0])
    pixels = cv2.resize(found_hw.astype(np.int16), size, interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(pixels, np.int64)
