"""Turns draws into pixels on a CPU: OpenCV on uint8, one image after the other.

Along each axis, a crop with more pixels than its view is averaged over the exact area of each view pixel, and a crop
with fewer is interpolated (bilinear or bicubic, edges repeated). What lies outside the image, or outside of what the
draw may show of it, is black. Then come the colour operations, in the draw's order. render_gpu.py computes the same
(tests/stages/pretrain/views/test_renderers.py compares them).
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from stages.pretrain.views.draw import shown, visible
from stages.pretrain.views.plan import Draw, Pixels

GRAY = (0.299, 0.587, 0.114)  # weights of red, green and blue in a grey value: ITU-R 601, as in PIL and torchvision
_TAPS = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
_EYE = np.eye(3, 4, dtype=np.float32)


def render(image: Pixels, item: Draw, reduced: int = 1) -> Pixels:
    """One view (size, size, 3), cut and coloured; `image` is decoded at 1/`reduced` of its size (sides rounded up)."""
    return recolour(cut(image, item, reduced), item.colour)


def cut(image: Pixels, item: Draw, reduced: int = 1) -> Pixels:
    """One view (size, size, 3) before any colour operation; `image` as in `render`."""
    left, top, right, bottom = visible(item, image.shape[1], image.shape[0], reduced)
    image = image[top:bottom, left:right]
    if not image.size:
        return np.zeros((item.size, item.size, 3), np.uint8)
    rect = [edge / reduced - corner for edge, corner in zip(shown(item), (left, top, left, top), strict=True)]
    x0, y0, x1, y1 = whole = [round(edge) for edge in rect]
    height, width = image.shape[:2]
    on_pixels = max(abs(a - b) for a, b in zip(rect, whole, strict=True)) < 1e-6
    if on_pixels and x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height:
        view = _resize(image[y0:y1, x0:x1], item.size, item.interpolation)
    else:
        view = _cut_anywhere(image, np.array(rect), item)
    return cv2.flip(view, 1) if item.affine[0, 0] < 0 else view


def cut_labels(labels: NDArray[Any], item: Draw) -> NDArray[np.int32]:
    """The labels (size, size) of a view's pixels, from a label map (H, W) of the stored image.

    A view pixel has the label of the image pixel that its centre lies in; -1 where that is outside the image, or
    outside of what the draw may show of it.
    """
    x = np.floor(item.affine[0, 0] * (np.arange(item.size) + 0.5) + item.affine[0, 2]).astype(np.int64)
    y = np.floor(item.affine[1, 1] * (np.arange(item.size) + 0.5) + item.affine[1, 2]).astype(np.int64)
    height, width = labels.shape
    found = labels[np.clip(y, 0, height - 1)[:, None], np.clip(x, 0, width - 1)].astype(np.int32)
    left, top, right, bottom = visible(item, width, height)
    found[(y < top) | (y >= bottom)] = -1
    found[:, (x < left) | (x >= right)] = -1
    return found


# ---------------------------------------------------------------------------------------------------------- pixels
def _resize(crop: Pixels, size: int, interpolation: str) -> Pixels:
    height, width = crop.shape[:2]
    if height >= size and width >= size:
        return cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA)
    if height > size:  # more pixels than the view along one axis, fewer along the other: average, then interpolate
        crop = cv2.resize(crop, (width, size), interpolation=cv2.INTER_AREA)
    elif width > size:
        crop = cv2.resize(crop, (size, height), interpolation=cv2.INTER_AREA)
    return cv2.resize(crop, (size, size), interpolation=_TAPS[interpolation])


def _cut_anywhere(image: Pixels, rect: NDArray[np.float64], item: Draw) -> Pixels:
    """A crop that does not lie on whole pixels, or reaches past the image's edge.

    It is resampled to a grid of whole cells, at least as fine as the image and as the view, and then averaged.
    """
    size = item.size
    height, width = image.shape[:2]
    spans = rect[2:] - rect[:2]
    cells = np.maximum(np.ceil(spans - 1e-6), size).astype(int)  # columns, rows of that grid
    scale = spans / cells
    shift = rect[:2] + 0.5 * scale - 0.5  # in OpenCV a pixel's centre is at i, here at i + 0.5
    matrix = np.array([[scale[0], 0, shift[0]], [0, scale[1], shift[1]]])
    taps = cv2.INTER_LINEAR if (scale >= 1 - 1e-9).all() else _TAPS[item.interpolation]
    view = cv2.warpAffine(
        image, matrix, cells.tolist(), flags=taps | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE
    )
    x = rect[0] + (np.arange(cells[0]) + 0.5) * scale[0]
    y = rect[1] + (np.arange(cells[1]) + 0.5) * scale[1]
    view[(y < 0) | (y > height)] = 0
    view[:, (x < 0) | (x > width)] = 0
    return _resize(view, size, item.interpolation)


# ---------------------------------------------------------------------------------------------------------- colour
def recolour(view: Pixels, colour: Any) -> Pixels:
    """A view after a draw's colour operations (draw.py lists the keys)."""
    for name in colour.get("order", ()):
        view = _JITTER[name](view, colour[name])
    if colour.get("gray"):
        view = cv2.cvtColor(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if "blur" in colour:
        side = blur_taps(colour["blur"])
        view = cv2.GaussianBlur(view, (side, side), colour["blur"])
    if "solarize" in colour:
        values = np.arange(256)
        view = cv2.LUT(view, np.where(values >= colour["solarize"] * 255, 255 - values, values).astype(np.uint8))
    return view


def blur_taps(sigma: float) -> int:
    """Width of the blur's kernel in pixels, an odd number: three sigmas to each side."""
    return round(sigma * 6 + 1) | 1


def _brightness(view: Pixels, factor: float) -> Pixels:
    return cv2.transform(view, _EYE * np.float32(factor))


def _contrast(view: Pixels, factor: float) -> Pixels:
    mean = float(np.dot(cv2.mean(view)[:3], GRAY))
    matrix = _EYE * np.float32(factor)
    matrix[:, 3] = mean * (1 - factor)
    return cv2.transform(view, matrix)


def _saturation(view: Pixels, factor: float) -> Pixels:
    matrix = _EYE * np.float32(factor)
    matrix[:, :3] += np.asarray(GRAY, np.float32) * (1 - factor)
    return cv2.transform(view, matrix)


def _hue(view: Pixels, turn: float) -> Pixels:
    hsv = cv2.cvtColor(view, cv2.COLOR_RGB2HSV_FULL)  # hue 0 to 255 is one turn
    hsv[..., 0] += np.uint8(round(turn * 256) % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


_JITTER = {"brightness": _brightness, "contrast": _contrast, "saturation": _saturation, "hue": _hue}
