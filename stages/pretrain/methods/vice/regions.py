"""Where ViCE's views lie and which regions they share: pure functions on numpy arrays.

Source: docs/methods.md#vice-views.

Rectangles are x0, y0, x1, y1; the last row and column are excluded. A label map holds region ids from 0 on, and -1
outside of the image.

Shape legend: V views, S side of a view in pixels, H W sides of an image.
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
RegionFlags = NDArray[np.bool_]  # (number of ids,), whether a region is in a set
Rectangle = tuple[int, int, int, int]  # x0, y0, x1, y1 in whole pixels
MASKED = -2  # in a map of mutual regions: a pixel to be filled with noise (-1: a pixel of no mutual region)


# ------------------------------------------------------------------------------------------------------- the frame
@dataclass(frozen=True)
class Frame:
    """The standardised image: the stored image, scaled, then padded or cut around its middle.

    Source: docs/methods.md#vice-standard-image.
    """

    scale: float  # pixels of the frame per pixel of the stored image
    left: int  # column of the frame where the scaled image begins; negative if it is cut
    top: int  # its row, likewise
    width: int  # of the frame, in pixels
    height: int

    def to_image(self, rect: Sequence[float]) -> NDArray[np.float64]:
        """A rectangle of the frame, in pixels of the stored image."""
        return (np.asarray(rect, np.float64) - (self.left, self.top, self.left, self.top)) / self.scale

    def seen(self, width: int, height: int) -> Rectangle:
        """The part of the stored image, in its whole pixels, that the frame shows.

        Args:
            width: of the stored image.
            height: likewise.
        """
        edges = np.rint(self.to_image((0, 0, self.width, self.height))).clip(0, (width, height, width, height))
        x0, y0, x1, y1 = (int(edge) for edge in edges)
        return x0, y0, x1, y1


def padded_frame(width: int, height: int, size: int, longest: int) -> Frame:
    """A frame that shows all of the image, padded.

    Args:
        width: of the stored image, in pixels.
        height: of the stored image.
        size: a smaller image is enlarged until its longer side is `size`; a shorter side is padded to `size`.
        longest: a larger frame is then shrunk until its longer side is this.
    """
    scale = max(1.0, size / max(width, height))
    full = [max(size, round(side * scale)) for side in (width, height)]
    shrink = min(1.0, longest / max(full))
    return _centred(width, height, scale * shrink, round(full[0] * shrink), round(full[1] * shrink))


def square_frame(width: int, height: int, size: int) -> Frame:
    """A frame that shows the middle square of the image, scaled to `size` pixels a side."""
    return _centred(width, height, size / min(width, height), size, size)


def _centred(width: int, height: int, scale: float, full_width: int, full_height: int) -> Frame:
    left, top = (full_width - _scaled(width, scale)) // 2, (full_height - _scaled(height, scale)) // 2
    return Frame(scale, left, top, full_width, full_height)


def _scaled(side: int, scale: float) -> int:
    return max(1, round(side * scale))


def standardise(pixels: NDArray[np.uint8], frame: Frame) -> NDArray[np.uint8]:
    """The pixels of the frame, (height, width, 3); black outside of the image."""
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
    """Weights (H, W) of the pixels as the centre of a view: high near edges, low but positive elsewhere."""
    gray = cv2.cvtColor(cv2.GaussianBlur(pixels, (3, 3), 0), cv2.COLOR_RGB2GRAY)
    edges = cv2.dilate(cv2.Canny(gray, 10, 50, L2gradient=True), np.ones((3, 3), np.uint8))
    return cv2.GaussianBlur(edges, (3, 3), 0).astype(np.float32) / np.float32(255) + np.float32(0.005)


def content_centre(rng: np.random.Generator, weights: NDArray[np.float32]) -> tuple[int, int]:
    """Draws a pixel with probability proportional to its weight: x, y."""
    total = np.cumsum(weights, dtype=np.float64)
    y, x = divmod(int(np.searchsorted(total, rng.random() * total[-1], side="right")), weights.shape[1])
    return x, y


def von_mises_share(rng: np.random.Generator, mode: float, kappa: float = 2.0) -> float:
    """Draws from a von Mises distribution, as a share of the circle in [0, 1].

    Args:
        rng: source of random numbers.
        mode: the most likely angle, in [-pi, pi]; -pi becomes 0, 0 becomes 0.5, pi / 2 becomes 0.75.
        kappa: concentration.
    """
    return (rng.vonmises(mode, kappa) + math.pi) / (2 * math.pi)


def clip_centre(x: int, y: int, side: float, width: int, height: int) -> tuple[int, int]:
    """Moves the centre of a square to the nearest place where the square lies inside the image.

    Along an axis on which the square is longer than the image, the centre is the image's.

    Args:
        x: column of the centre.
        y: row of the centre.
        side: of the square, in pixels.
        width: of the image, in pixels.
        height: of the image, in pixels.
    """

    def clip(at: int, length: int) -> int:
        low, high = math.ceil(side / 2), int(length - side / 2)
        return min(max(at, low), high) if low <= high else length // 2

    return clip(x, width), clip(y, height)


def surrounding_centre(rng: np.random.Generator, x: int, y: int, side: float, turn: int, turns: int) -> tuple[int, int]:
    """Draws the centre of a surrounding view. The circle around the first centre has one sector for each such view.

    Args:
        rng: source of random numbers.
        x: column of the first view's centre.
        y: row of the first view's centre.
        side: of the surrounding view, in pixels; the two centres are at most side / 2 apart.
        turn: which of the surrounding views, from 0.
        turns: number of surrounding views.

    Returns:
        x, y, possibly outside of the image.
    """
    angle = (turn + von_mises_share(rng, 0.0)) * 2 * math.pi / turns
    radius = side / 2 * von_mises_share(rng, math.pi / 2)
    clockwise = math.pi / 2 - angle
    return x + int(radius * math.cos(clockwise)), y + int(radius * math.sin(clockwise))


def square(x: int, y: int, side: float) -> Rectangle:
    """The square around a centre, in whole pixels."""
    half = int(side / 2)
    return x - half, y - half, x + half, y + half


def common_rectangle(squares: Sequence[Rectangle]) -> Rectangle:
    """The rectangle that all squares share; x1 <= x0 or y1 <= y0 if there is none."""
    x0, y0, x1, y1 = zip(*squares, strict=True)
    return max(x0), max(y0), min(x1), min(y1)


# ------------------------------------------------------------------------------------------- which regions they share
def present(labels: LabelMap, rect: NDArray[Any], ids: int) -> RegionFlags:
    """Which of the `ids` regions have a pixel in a rectangle of the map."""
    x0, y0, x1, y1 = (max(0, int(edge)) for edge in rect)
    found = np.zeros(ids + 1, bool)
    found[labels[y0:y1, x0:x1]] = True  # the last entry takes the -1s
    return found[:-1]


def mutual(maps: Sequence[LabelMap], rects: NDArray[Any], ids: int) -> RegionFlags:
    """Which of the `ids` regions have a pixel in the rectangle of every view's map."""
    return np.logical_and.reduce([present(map_, rect, ids) for map_, rect in zip(maps, rects, strict=True)])


def mutual_regions(
    maps: Sequence[LabelMap], kept: RegionFlags, masked: Sequence[RegionFlags] = ()
) -> tuple[LabelMap, int]:
    """Renumbers the kept regions 0 to n - 1, in the order of their ids.

    Args:
        maps: the label map of every view.
        kept: the mutual regions.
        masked: the masked regions of every view, or nothing.

    Returns:
        The maps (V, S, S), with -1 for regions that are not kept and `MASKED` for a view's masked regions; and n.
    """
    names = np.where(kept, np.cumsum(kept) - 1, -1).astype(np.int32)
    tables = [np.where(flags, MASKED, names) for flags in masked] if masked else [names] * len(maps)
    tables = [np.append(table, -1).astype(np.int32) for table in tables]
    return np.stack([table[map_] for table, map_ in zip(tables, maps, strict=True)]), int(kept.sum())


def mask_rectangle(rng: np.random.Generator, size: int, ratio: float, reach: float) -> Rectangle:
    """Draws a rectangle of a view. Regions that touch it are masked.

    Source: docs/methods.md#vice-region-masking.

    Args:
        rng: source of random numbers.
        size: side of the view in pixels; the rectangle is clipped to it.
        ratio: largest side of the rectangle, as a fraction of the view's.
        reach: largest distance of its centre from the middle of the view, in pixels.
    """
    radius, angle = reach * von_mises_share(rng, math.pi / 2), rng.uniform(0, 2 * math.pi)
    x, y = size / 2 + radius * math.cos(angle), size / 2 + radius * math.sin(angle)
    width, height = (ratio * size * von_mises_share(rng, math.pi / 2) for _ in range(2))
    edges = math.floor(x - width / 2), math.floor(y - height / 2), math.ceil(x + width / 2), math.ceil(y + height / 2)
    x0, y0, x1, y1 = (min(max(edge, 0), size) for edge in edges)
    return x0, y0, x1, y1
