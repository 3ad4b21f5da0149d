"""Where ViCE's views lie and which regions they share (docs/methods.md#vice-views). Pure functions on numpy arrays.

Rectangles are x0, y0, x1, y1, the last row and column excluded. A label map holds region ids from 0 on, -1 where there
is no image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

LabelMap = NDArray[np.int32]  # (S, S)
RegionFlags = NDArray[np.bool_]  # (ids,)
Rectangle = tuple[int, int, int, int]
MASKED = -2  # in a map of mutual regions: to be filled with noise; -1: part of no mutual region


# ------------------------------------------------------------------------------------------------------- the frame
@dataclass(frozen=True)
class Frame:
    """The standardised image: the stored one, scaled, then padded or cut about its middle."""

    scale: float  # pixels of the frame per pixel of the stored image
    left: int  # where the scaled image begins in the frame; negative where it is cut
    top: int
    width: int
    height: int

    def to_image(self, rect: Sequence[float]) -> NDArray[np.float64]:
        """A rectangle of the frame in pixels of the stored image."""
        return (np.asarray(rect, np.float64) - (self.left, self.top, self.left, self.top)) / self.scale


def padded_frame(width: int, height: int, size: int, longest: int) -> Frame:
    """Enlarged until the longer side is `size`, the shorter side padded to it, shrunk to at most `longest`."""
    scale = max(1.0, size / max(width, height))
    full = [max(size, round(side * scale)) for side in (width, height)]
    shrink = min(1.0, longest / max(full))
    return _centred(width, height, scale * shrink, round(full[0] * shrink), round(full[1] * shrink))


def square_frame(width: int, height: int, size: int) -> Frame:
    """The middle square, scaled to `size`."""
    return _centred(width, height, size / min(width, height), size, size)


def _centred(width: int, height: int, scale: float, full_width: int, full_height: int) -> Frame:
    left, top = (full_width - _scaled(width, scale)) // 2, (full_height - _scaled(height, scale)) // 2
    return Frame(scale, left, top, full_width, full_height)


def _scaled(side: int, scale: float) -> int:
    return max(1, round(side * scale))


def standardise(pixels: NDArray[np.uint8], frame: Frame) -> NDArray[np.uint8]:
    """The frame's pixels, black around the image."""
    height, width = (_scaled(side, frame.scale) for side in pixels.shape[:2])
    if (height, width) != pixels.shape[:2]:
        pixels = np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    pixels = pixels[max(0, -frame.top) :, max(0, -frame.left) :][: frame.height, : frame.width]
    below, right = frame.height - pixels.shape[0], frame.width - pixels.shape[1]
    if below or right:
        top, left = max(0, frame.top), max(0, frame.left)
        pixels = cv2.copyMakeBorder(pixels, top, below - top, left, right - left, cv2.BORDER_CONSTANT)
    return pixels


# ------------------------------------------------------------------------------------------------- where views lie
def content_map(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(H, W) weights of pixels as a view's centre: thick edges, and a little everywhere. Not normalised."""
    gray = cv2.cvtColor(cv2.GaussianBlur(pixels, (3, 3), 0), cv2.COLOR_RGB2GRAY)
    edges = cv2.dilate(cv2.Canny(gray, 10, 50, L2gradient=True), np.ones((3, 3), np.uint8))
    return cv2.GaussianBlur(edges, (3, 3), 0).astype(np.float32) / np.float32(255) + np.float32(0.005)


def content_centre(rng: np.random.Generator, weights: NDArray[np.float32]) -> tuple[int, int]:
    """x, y of a pixel drawn by its weight."""
    total = np.cumsum(weights, dtype=np.float64)
    y, x = divmod(int(np.searchsorted(total, rng.random() * total[-1], side="right")), weights.shape[1])
    return x, y


def von_mises_share(rng: np.random.Generator, mode: float, kappa: float = 2.0) -> float:
    """A von Mises draw as a share of the circle, in [0, 1]: pi / 2 gives the mode 0.75, 0 gives 0.5."""
    return (rng.vonmises(mode, kappa) + math.pi) / (2 * math.pi)


def clip_centre(x: int, y: int, side: float, width: int, height: int) -> tuple[int, int]:
    """The nearest centre whose square lies in the image; the image's own where the square is larger than it."""

    def clip(at: int, length: int) -> int:
        low, high = math.ceil(side / 2), int(length - side / 2)
        return min(max(at, low), high) if low <= high else length // 2

    return clip(x, width), clip(y, height)


def surrounding_centre(rng: np.random.Generator, x: int, y: int, side: float, turn: int, turns: int) -> tuple[int, int]:
    """The centre of surrounding view `turn` of `turns`, not clipped: within side / 2 of (x, y), in its own sector."""
    angle = (turn + von_mises_share(rng, 0.0)) * 2 * math.pi / turns
    radius = side / 2 * von_mises_share(rng, math.pi / 2)
    clockwise = math.pi / 2 - angle
    return x + int(radius * math.cos(clockwise)), y + int(radius * math.sin(clockwise))


def square(x: int, y: int, side: float) -> Rectangle:
    """The square about a centre, in whole pixels."""
    half = int(side / 2)
    return x - half, y - half, x + half, y + half


def common_rectangle(squares: Sequence[Rectangle]) -> Rectangle:
    """What all of them share; x1 <= x0 or y1 <= y0 where they share nothing."""
    x0, y0, x1, y1 = zip(*squares, strict=True)
    return max(x0), max(y0), min(x1), min(y1)


# ------------------------------------------------------------------------------------------- which regions they share
def present(labels: LabelMap, rect: NDArray[Any], ids: int) -> RegionFlags:
    """(ids,) which regions have a pixel in a rectangle of the map."""
    x0, y0, x1, y1 = (max(0, int(edge)) for edge in rect)
    found = np.zeros(ids + 1, bool)
    found[labels[y0:y1, x0:x1]] = True  # the last entry takes the -1s
    return found[:-1]


def mutual(maps: Sequence[LabelMap], rects: NDArray[Any], ids: int) -> RegionFlags:
    """(ids,) the regions with a pixel in every map's rectangle: the first view's is the whole map."""
    return np.logical_and.reduce([present(map_, rect, ids) for map_, rect in zip(maps, rects, strict=True)])


def mutual_regions(
    maps: Sequence[LabelMap], kept: RegionFlags, masked: Sequence[RegionFlags] = ()
) -> tuple[LabelMap, int]:
    """The maps (V, S, S) with the kept regions called 0..n-1 in the order of their ids, -1 elsewhere, and n.

    Pixels of a view's masked regions become MASKED.
    """
    names = np.where(kept, np.cumsum(kept) - 1, -1).astype(np.int32)
    tables = [np.where(flags, MASKED, names) for flags in masked] if masked else [names] * len(maps)
    tables = [np.append(table, -1).astype(np.int32) for table in tables]
    return np.stack([table[map_] for table, map_ in zip(tables, maps, strict=True)]), int(kept.sum())


def mask_rectangle(rng: np.random.Generator, size: int, ratio: float, reach: float) -> Rectangle:
    """A rectangle of a view of `size` pixels, at most `ratio` of it a side, its centre within `reach` of the middle."""
    radius, angle = reach * von_mises_share(rng, math.pi / 2), rng.uniform(0, 2 * math.pi)
    x, y = size / 2 + radius * math.cos(angle), size / 2 + radius * math.sin(angle)
    width, height = (ratio * size * von_mises_share(rng, math.pi / 2) for _ in range(2))
    edges = math.floor(x - width / 2), math.floor(y - height / 2), math.ceil(x + width / 2), math.ceil(y + height / 2)
    x0, y0, x1, y1 = (min(max(edge, 0), size) for edge in edges)
    return x0, y0, x1, y1
