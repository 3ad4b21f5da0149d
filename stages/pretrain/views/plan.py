"""What a method asks of the data: which views, how each is cut and coloured, and which tables it needs.

A plan is plain data; draw.py turns it into draws (numbers), and a renderer turns draws into pixels.
Coordinates are continuous: pixel i covers [i, i+1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]  # (height, width, 3) RGB


@dataclass(frozen=True)
class Photometric:
    """Colour operations of one view. A name that ends in _p is the probability that the operation is applied.

    Order: jitter (brightness, contrast, saturation, hue in random order), grey, blur, solarise, normalise.
    """

    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # strengths; 0: not that one
    jitter_p: float = 0.0
    gray_p: float = 0.0
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels of the view
    solarize_p: float = 0.0
    solarize_threshold: float = 0.5  # of the [0, 1] range
    # If set: with this probability blur_p and no solarising, else a blur_p of 0.1 (docs/methods.md#flsl-views).
    blur_else_solarize_p: float | None = None


@dataclass(frozen=True)
class ViewSpec:
    """`count` random resized crops of one kind, each shown as a square view."""

    name: str  # key in Batch.views: "global", "local", "teacher", "neighbor", ...
    size: int  # side of the square view in pixels
    count: int = 1
    scale: tuple[float, float] = (0.25, 1.0)  # area of the crop as a fraction of its parent's
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the crop
    flip_p: float = 0.0  # horizontal
    photometric: Photometric | tuple[Photometric, ...] = Photometric()  # one for all, or one a view (DINO's globals)
    parent: str | None = None  # crop from that view's rectangle instead of the whole image (FLSL's nested crops)
    # "neighbor": of an image drawn from the k-NN row; images of role "objects" have one (data/batch.py).
    of: Literal["image", "neighbor"] = "image"
    whole: bool = False  # the whole image squeezed to size x size (D3SSL's first view); scale and ratio unused
    min_overlap: float = (
        0.0  # with each earlier view called `overlap_with`: least common area, as a fraction of the image's
    )
    overlap_with: str | None = None
    labels: bool = False  # also cut the superpixel map (nearest; -1 outside)
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"


@dataclass
class ImageRow:
    """One image as the drawer sees it; pixels are decoded only when asked for."""

    image_id: int
    width: int  # of the stored image, upright
    height: int
    pixels: Callable[[], Pixels]  # decodes the image at full size
    boxes: NDArray[np.float32] | None = None  # (n, 4) x0 y0 x1 y1 in stored-image pixels, best first
    superpixels: NDArray[np.int32] | None = None  # (height, width) labels 0..n-1


@dataclass(frozen=True)
class Draw:
    """One view as plain numbers: nothing of it is rendered yet."""

    view: str  # the ViewSpec's name
    affine: NDArray[np.float64]  # (2, 3): stored-image point = affine @ [x_view, y_view, 1]
    size: int
    colour: Mapping[str, Any] = field(default_factory=dict)  # photometric parameters, drawn (see draw.py)
    labels: bool = False
    of: Literal["image", "neighbor"] = "image"
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    within: tuple[int, int, int, int] | None = (
        None  # the pixels x0, y0, x1, y1 of the image that may be seen; None: all
    )


@dataclass
class Drawn:
    """What drawing gives for one image."""

    draws: list[Draw]
    extras: dict[str, NDArray[Any]] = field(default_factory=dict)  # stacked into Batch.extras: boxes (K, 4), masks, ...
    skipped: str | None = None  # why this image cannot be used ("no mutual region"): another then takes its place


DrawFn = Callable[[np.random.Generator, ImageRow], Drawn]


@dataclass(frozen=True)
class ViewPlan:
    """All that a method asks of the data."""

    views: tuple[ViewSpec, ...]
    tables: tuple[Literal["boxes", "superpixels", "neighbors", "embeddings"], ...] = ()
    drawer: DrawFn | None = None  # draws in place of draw.py's multi-crop (ViCE, D3SSL); it must pickle
