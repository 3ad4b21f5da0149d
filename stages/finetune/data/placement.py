"""Where a stored image lies in a training image: which part of it, at which place, mirrored or not.

Pixels, masks and boxes follow the same whole numbers, so that they stay aligned.

Shape legend: H W sides of the stored image, h w of the training image, N boxes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]  # (H, W, 3)
Rect = tuple[int, int, int, int]  # x0, y0, x1, y1 in whole pixels
TRIES = 10  # crops drawn before the whole image is taken, as torchvision does


@dataclass(frozen=True)
class Placement:
    """The part `source` of the stored image fills the part `target` of a training image of `size`."""

    source: Rect
    target: Rect
    size: tuple[int, int]  # width, height
    mirrored: bool = False

    def pixels(self, image: Pixels, fill: int = 0) -> Pixels:
        """(H, W, 3) -> (h, w, 3); averages where it shrinks, so that nothing aliases."""
        width, height = _sides(self.target)
        part = _cut(image, self.source)
        shrinks = width * height < part.shape[0] * part.shape[1]
        resized = cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        return np.ascontiguousarray(self._placed(resized, fill))

    def mask(self, mask: NDArray[Any], void: int) -> NDArray[Any]:
        """(H, W) class indices -> (h, w); the nearest pixel, `void` where there is no image."""
        part = np.ascontiguousarray(_cut(mask, self.source))
        resized = cv2.resize(part, _sides(self.target), interpolation=cv2.INTER_NEAREST_EXACT)
        return np.ascontiguousarray(self._placed(resized, void))

    def boxes(self, boxes_N4: NDArray[np.float32]) -> NDArray[np.float32]:
        """Boxes x0, y0, x1, y1 of the stored image in the training image, cut at the borders of the placed part."""
        scale = np.array(_sides(self.target), np.float64) / _sides(self.source)
        origin = np.array(self.source[:2], np.float64)
        low, high = np.array(self.target[:2], np.float64), np.array(self.target[2:], np.float64)
        corners = (boxes_N4.reshape(-1, 2, 2).astype(np.float64) - origin) * scale + low
        corners = corners.clip(low, high)
        if self.mirrored:
            corners[..., 0] = self.size[0] - corners[:, ::-1, 0]
        return corners.reshape(-1, 4).astype(np.float32)

    def _placed(self, part: NDArray[Any], fill: int) -> NDArray[Any]:
        width, height = self.size
        x0, y0, x1, y1 = self.target
        if (x0, y0, x1, y1) != (0, 0, width, height):
            whole = np.full((height, width, *part.shape[2:]), fill, part.dtype)
            whole[y0:y1, x0:x1] = part
            part = whole
        return part[:, ::-1] if self.mirrored else part


def mirrored(placement: Placement, rng: np.random.Generator, probability: float) -> Placement:
    """The same, mirrored with this probability."""
    return replace(placement, mirrored=bool(rng.random() < probability))


def resized_crop(
    rng: np.random.Generator,
    width: int,
    height: int,
    *,
    size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Placement:
    """A random part of the image, stretched to a square, as torchvision's RandomResizedCrop.

    Args:
        rng: where the randomness comes from.
        width: of the stored image.
        height: likewise.
        size: side of the square.
        scale: area of the part over the image's.
        ratio: width of the part over its height; its logarithm is uniform.
    """
    target = (0, 0, size, size)
    for _ in range(TRIES):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return Placement((x, y, x + w, y + h), target, (size, size))
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))  # the largest in its middle
    x, y = (width - w) // 2, (height - h) // 2
    return Placement((x, y, x + w, y + h), target, (size, size))


def scaled_crop(rng: np.random.Generator, width: int, height: int, *, size: int, factor: float) -> Placement:
    """The image scaled by a factor, and a random square of `size` cut from it; what is missing stays empty.

    Args:
        rng: where the randomness comes from.
        width: of the stored image.
        height: likewise.
        size: side of the square.
        factor: of both sides of the image.
    """
    spans = []
    for side in (width, height):
        part = min(side, max(1, round(size / factor)))  # of the stored image
        start = int(rng.integers(0, side - part + 1))
        spans.append((start, start + part, min(size, max(1, round(part * factor)))))
    (x0, x1, w), (y0, y1, h) = spans
    return Placement((x0, y0, x1, y1), (0, 0, w, h), (size, size))


def whole(width: int, height: int, size: tuple[int, int]) -> Placement:
    """The whole image at another size."""
    return Placement((0, 0, width, height), (0, 0, *size), size)


def jittered(rng: np.random.Generator, pixels: Pixels, strength: float) -> Pixels:
    """Brightness, contrast and saturation changed by factors of 1 - strength to 1 + strength."""
    if not strength:
        return pixels
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    values = pixels.astype(np.float32) * brightness
    grey = values @ np.array([0.299, 0.587, 0.114], np.float32)
    values = grey.mean() + contrast * (values - grey.mean())
    grey = grey.mean() + contrast * (grey - grey.mean())
    values = grey[..., None] + saturation * (values - grey[..., None])
    return values.clip(0, 255).astype(np.uint8)


def _cut(image: NDArray[Any], rect: Rect) -> NDArray[Any]:
    x0, y0, x1, y1 = rect
    return image[y0:y1, x0:x1]


def _sides(rect: Rect) -> tuple[int, int]:
    return rect[2] - rect[0], rect[3] - rect[1]
