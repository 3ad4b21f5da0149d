"""What `segment_linear` cuts from images: train crops with their labels, test images whole or as windows.

Source: docs/methods.md#linear-segmentation.

Shape legend: H W sides of an image, S side of the training labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stages.data.images import decode
from stages.data.mask_classes import MaskClasses, MaskLabels
from stages.data.windows import window_corners
from stages.evaluate.segment_linear_settings import SegmentLinearConfig
from stages.models.inference import RGB, squeeze

_PADDING = (124, 116, 104)  # ImageNet's mean colour: 0 for an encoder


class ScoredImage(NamedTuple):
    """A test image as an encoder sees it, and its truth."""

    image_id: int
    key: str
    windows: list[RGB]  # each (test_size, test_size, 3): the whole image, or those that slide over it
    corners: list[tuple[int, int]]  # top, left of each
    canvas: tuple[int, int]  # height, width that they cover
    pixels: RGB  # (H, W, 3)
    truth: MaskLabels  # (H, W), or (score_size, score_size)


def train_crops(
    row: Mapping[str, Any], *, classes: MaskClasses, config: SegmentLinearConfig
) -> list[tuple[RGB, MaskLabels]]:
    """The crops of a train image at the encoder's size, each with labels at the size where logits meet them.

    Raises: ImageError.
    """
    pixels = decode(row["image"])
    labels = classes.labels(row["mask"], pixels.shape[:2])
    if not config.crops:
        return [_fit_crop(pixels, labels, config)]
    generator = np.random.default_rng((config.seed, row["image_id"]))
    crops = []
    for _ in range(config.crops):
        if config.zoom is not None:
            crops.append(_fit_crop(*square_crop(generator, pixels, labels, config.zoom), config))
            continue
        top, left, height, width = draw_crop(generator, labels.shape[0], labels.shape[1], config.crop_scale)
        window = np.s_[top : top + height, left : left + width]
        crops.append(_fit_crop(pixels[window], labels[window], config))
    return crops


def _fit_crop(pixels: RGB, labels: MaskLabels, config: SegmentLinearConfig) -> tuple[RGB, MaskLabels]:
    return squeeze(np.ascontiguousarray(pixels), config.train_size, config.train_size), _resized(
        labels, config.label_size
    )


def _resized(labels: MaskLabels, side: int) -> MaskLabels:
    return np.asarray(
        cv2.resize(np.ascontiguousarray(labels), (side, side), interpolation=cv2.INTER_NEAREST_EXACT), np.int16
    )


def draw_crop(
    generator: np.random.Generator, height: int, width: int, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """A rectangle (top, left, height, width) of that share of the area, aspect within 3/4 to 4/3 of the image's."""
    area = generator.uniform(*scale)
    aspect = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
    h = min(height, max(1, round(height * np.sqrt(area / aspect))))
    w = min(width, max(1, round(width * np.sqrt(area * aspect))))
    return int(generator.integers(height - h + 1)), int(generator.integers(width - w + 1)), h, w


def square_crop(
    generator: np.random.Generator, pixels: RGB, labels: MaskLabels, zoom: tuple[float, float]
) -> tuple[RGB, MaskLabels]:
    """A square whose side is the image's short side over a number drawn within `zoom`; padded where that is longer."""
    side = max(1, round(min(labels.shape) / generator.uniform(*zoom)))
    top, left = (int(generator.integers(max(0, length - side) + 1)) for length in labels.shape)
    cut = np.s_[top : top + side, left : left + side]
    height, width = labels[cut].shape
    padded, void = np.empty((side, side, 3), np.uint8), np.full((side, side), -1, np.int16)
    padded[:] = _PADDING
    padded[:height, :width], void[:height, :width] = pixels[cut], labels[cut]
    return padded, void


def scored_image(row: Mapping[str, Any], *, classes: MaskClasses, config: SegmentLinearConfig) -> ScoredImage:
    """A test image resized whole, or cut into windows. Raises ImageError."""
    pixels = decode(row["image"])
    truth = classes.labels(row["mask"], pixels.shape[:2])
    side = config.test_size
    if config.slide is None:
        seen, corners = squeeze(pixels, side, side), [(0, 0)]
    else:
        scale = side / min(truth.shape)
        seen = squeeze(pixels, *(max(side, round(length * scale)) for length in truth.shape))
        corners = window_corners(seen.shape[0], seen.shape[1], side, config.slide)
    windows = [np.ascontiguousarray(seen[top : top + side, left : left + side]) for top, left in corners]
    if config.score_size is not None:
        truth = _resized(truth, config.score_size)
    return ScoredImage(row["image_id"], str(row["key"]), windows, corners, seen.shape[:2], pixels, truth)


def joined(logits_NKhw: Tensor, image: ScoredImage, side: int) -> Tensor:
    """The logits of an image from those of its N windows, (1, K, h, w): enlarged to pixels and averaged where several.

    A single window's stay as they are.
    """
    if len(image.corners) == 1:
        return logits_NKhw
    enlarged = functional.interpolate(logits_NKhw, (side, side), mode="bilinear")
    total = enlarged.new_zeros(1, enlarged.shape[1], *image.canvas)
    times = enlarged.new_zeros(image.canvas)
    for one, (top, left) in zip(enlarged, image.corners, strict=True):
        total[0, :, top : top + side, left : left + side] += one
        times[top : top + side, left : left + side] += 1
    return torch.div(total, times)
