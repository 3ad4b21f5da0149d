"""Draws of the standard multi-crop: where every view lies and how it is coloured, as plain numbers.

No pixel is needed for it. The generator comes from (seed, epoch, source, image id), so that an image gets the same
views whichever process or rank reads it, and in whatever order.

`Draw.colour` may hold: "brightness", "contrast", "saturation" (factors), "hue" (turn, in [-0.5, 0.5]), "order" (the
jitter's operations in order, as names), "gray" (True), "blur" (sigma in view pixels), "solarize" (threshold in [0, 1]).
An operation that is not applied is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.pretrain.views.plan import Draw, Drawn, ImageRow, Photometric, ViewPlan, ViewSpec
from stages.training.sampler import generator as generator

OVERLAP_TRIES = 100  # crops drawn for `min_overlap` before the one that overlaps most is taken
MAX_REDUCTION = 8  # a JPEG can be decoded at 1/2, 1/4 and 1/8 of its size

Rect = tuple[float, float, float, float]  # x0, y0, x1, y1


def draw(plan: ViewPlan, rng: np.random.Generator, row: ImageRow) -> Drawn:
    """All draws of one image's own views, by the plan's drawer where it has one."""
    if plan.drawer:
        return plan.drawer(rng, row)
    return Drawn(draw_views([spec for spec in plan.views if spec.of == "image"], rng, row.width, row.height))


def draw_neighbor(plan: ViewPlan, rng: np.random.Generator, width: int, height: int) -> list[Draw]:
    """The draws of the plan's views with `of="neighbor"`.

    Args:
        plan: the method's.
        rng: where the randomness comes from.
        width: of the neighbour, in pixels.
        height: likewise.
    """
    return draw_views([spec for spec in plan.views if spec.of == "neighbor"], rng, width, height)


def draw_views(specs: Sequence[ViewSpec], rng: np.random.Generator, width: int, height: int) -> list[Draw]:
    """Random resized crops, in whole pixels of the image.

    A spec with a parent comes after it. Its i-th crop lies in the parent's i-th (counting round and round), and its
    scale and ratio are those of a crop of the parent's square view (docs/methods.md#flsl-views). Where none of
    OVERLAP_TRIES crops overlaps as much as `min_overlap` asks, the one that overlaps most is taken.

    Args:
        specs: the views; a view's crops follow each other in the result.
        rng: where the randomness comes from.
        width: of the image, in pixels.
        height: likewise.
    """
    rects: dict[str, list[Rect]] = {}
    draws = []
    sizes = {spec.name: spec.size for spec in specs}
    for spec in specs:
        mine = rects.setdefault(spec.name, [])
        for i in range(spec.count):
            others = rects.get(spec.overlap_with, []) if spec.overlap_with else []
            parent = rects[spec.parent][i % len(rects[spec.parent])] if spec.parent else None
            parent_size = sizes[spec.parent] if spec.parent else 0
            rect = _overlapping(spec, rng, width, height, parent, parent_size, others)
            mine.append(rect)
            flip = bool(rng.random() < spec.flip_p)
            colour = draw_colour(_photometric(spec, i), rng)
            affine = _affine(rect, spec.size, flip)
            draws.append(Draw(spec.name, affine, spec.size, colour, spec.labels, spec.of, spec.interpolation))
    return draws


def reduction(draws: Sequence[Draw]) -> int:
    """The coarsest scale (1, 2, 4 or 8) at which an image may be decoded so that no view loses resolution."""
    finest = float(MAX_REDUCTION)
    for item in draws:
        (sx, _, _), (_, sy, _) = item.affine.tolist()
        finest = min(finest, abs(sx), abs(sy))
    return _power_of_two(finest)


# ----------------------------------------------------------------------------------------------------------- crops
def random_crop(
    rng: np.random.Generator, width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], size: int
) -> Rect:
    """A random resized crop in whole pixels, by torchvision's rule.

    Ten tries, then the largest crop of an allowed ratio. Where a view pixel is 2, 4 or 8 image pixels wide or more,
    the crop's edges are moved by less than a view pixel to multiples of that number: so they lie on whole pixels also
    of the image decoded at a reduced scale.

    Args:
        rng: where the randomness comes from.
        width: of the image, in pixels.
        height: likewise.
        scale: least and largest area of the crop, as fractions of the image's.
        ratio: least and largest width / height of the crop.
        size: side of the view that will show the crop, in pixels.
    """
    w, h = _sides(rng, width, height, scale, ratio)
    w, h = max(1, min(width, round(w))), max(1, min(height, round(h)))
    x, y = int(rng.random() * (width - w + 1)), int(rng.random() * (height - h + 1))
    step = _power_of_two(min(w, h) / size)
    return x // step * step, y // step * step, (x // step + w // step) * step, (y // step + h // step) * step


def nested_crop(
    rng: np.random.Generator, parent: Rect, scale: tuple[float, float], ratio: tuple[float, float], size: int, own: int
) -> Rect:
    """A random resized crop of another view, as a rectangle of the image, in whole pixels where there is room for them.

    Args:
        rng: where the randomness comes from.
        parent: the rectangle of the image that the other view shows; the crop lies inside it.
        scale: least and largest area of the crop, as fractions of the other view's.
        ratio: least and largest width / height of the crop, in pixels of the other view.
        size: side of the other view in pixels.
        own: side of the view that will show the crop, in pixels.
    """
    w, h = _sides(rng, size, size, scale, ratio)
    x, y = _between(rng, 0, size - w), _between(rng, 0, size - h)
    fx, fy = (parent[2] - parent[0]) / size, (parent[3] - parent[1]) / size
    step = _power_of_two(min(w * fx, h * fy) / own)
    x0, x1 = _inward(parent[0] + x * fx, parent[0] + (x + w) * fx, step)
    y0, y1 = _inward(parent[1] + y * fy, parent[1] + (y + h) * fy, step)
    return x0, y0, x1, y1


def _inward(low: float, high: float, step: int) -> tuple[float, float]:
    """The first and last multiple of `step` inside [low, high]; the interval as it is where there are no two."""
    a, b = math.ceil(low / step - 1e-9) * step, math.floor(high / step + 1e-9) * step
    return (a, b) if b > a else (low, high)


def _sides(
    rng: np.random.Generator, width: float, height: float, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[float, float]:
    """Width and height of a random resized crop."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * _between(rng, *scale)
        aspect = math.exp(_between(rng, low, high))
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width + 1e-6 and h <= height + 1e-6:
            return min(w, width), min(h, height)
    return min(width, height * ratio[1]), min(height, width / ratio[0])


def _overlapping(
    spec: ViewSpec,
    rng: np.random.Generator,
    width: int,
    height: int,
    parent: Rect | None,
    parent_size: int,
    others: Sequence[Rect],
) -> Rect:
    if spec.whole:
        return 0, 0, width, height
    best, most = (0.0, 0.0, 0.0, 0.0), -1.0
    for _ in range(OVERLAP_TRIES):
        if parent is not None:
            rect = nested_crop(rng, parent, spec.scale, spec.ratio, parent_size, spec.size)
        else:
            rect = random_crop(rng, width, height, spec.scale, spec.ratio, spec.size)
        if not others or spec.min_overlap <= 0:
            return rect
        least = min(_common(rect, other) for other in others)
        if least > spec.min_overlap * width * height:
            return rect
        if least > most:
            best, most = rect, least
    return best


def _common(a: Rect, b: Rect) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _power_of_two(scale: float) -> int:
    """The largest of 1, 2, 4, 8 that is not above `scale`; 1 where `scale` is below 1."""
    return max(1, min(MAX_REDUCTION, 1 << (max(1, int(scale + 1e-9)).bit_length() - 1)))


def _affine(rect: Rect, size: int, flip: bool) -> NDArray[np.float64]:
    """The same as `geometry.crop_affine`, on plain numbers: it is called for every view, and numpy would be slower."""
    x0, y0, x1, y1 = rect
    row_x = [(x0 - x1) / size, 0.0, x1] if flip else [(x1 - x0) / size, 0.0, x0]
    return np.array([row_x, [0.0, (y1 - y0) / size, y0]], np.float64)


def shown(item: Draw) -> Rect:
    """The rectangle of the image that a draw shows: `geometry.rectangle` on plain numbers, which is faster."""
    (sx, _, tx), (_, sy, ty) = item.affine.tolist()
    ex, ey = tx + sx * item.size, ty + sy * item.size
    return min(tx, ex), min(ty, ey), max(tx, ex), max(ty, ey)


def visible(item: Draw, width: int, height: int, reduced: int = 1) -> tuple[int, int, int, int]:
    """The pixels x0, y0, x1, y1 of a decoded image that a draw may show; a view is black everywhere else.

    Args:
        item: the draw.
        width: of the decoded image.
        height: likewise.
        reduced: the image was decoded at 1/reduced of its size: pixels that are partly outside are not shown.
    """
    if item.within is None:
        return 0, 0, width, height
    x0, y0, x1, y1 = item.within
    return -(-x0 // reduced), -(-y0 // reduced), min(width, x1 // reduced), min(height, y1 // reduced)


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    """The same as `rng.uniform`, in a third of the time."""
    return low + (high - low) * rng.random()


# ---------------------------------------------------------------------------------------------------------- colour
def draw_colour(photometric: Photometric, rng: np.random.Generator) -> dict[str, Any]:
    """The photometric parameters of one view, under the keys that the top of this file lists."""
    p, colour = photometric, dict[str, Any]()
    if any(p.jitter) and rng.random() < p.jitter_p:
        names = ("brightness", "contrast", "saturation", "hue")
        for name, strength in zip(names, p.jitter, strict=True):
            if strength and name == "hue":
                colour[name] = _between(rng, -strength, strength)
            elif strength:
                colour[name] = _between(rng, max(0.0, 1 - strength), 1 + strength)
        colour["order"] = tuple(names[i] for i in rng.permutation(4) if names[i] in colour)
    if rng.random() < p.gray_p:
        colour["gray"] = True
    blur_p, solarize_p = p.blur_p, p.solarize_p
    if p.blur_else_solarize_p is not None:
        if rng.random() < p.blur_else_solarize_p:
            solarize_p = 0.0
        else:
            blur_p = 0.1  # docs/methods.md#flsl-views
    if rng.random() < blur_p:
        colour["blur"] = _between(rng, *p.blur_sigma)
    if rng.random() < solarize_p:
        colour["solarize"] = p.solarize_threshold
    return colour


def _photometric(spec: ViewSpec, index: int) -> Photometric:
    if isinstance(spec.photometric, Photometric):
        return spec.photometric
    if len(spec.photometric) != spec.count:
        raise ValueError(f"view {spec.name!r} has {spec.count} crops and {len(spec.photometric)} photometric settings")
    return spec.photometric[index]
