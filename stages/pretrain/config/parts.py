"""Settings that several methods share: crops, heads, dense alignment, the teacher's schedules. Free of torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.stage import Settings

Range = tuple[float, float]  # the smaller number first
Export = Literal["student", "teacher"]  # whose encoder a method with a moving average gives: see docs/methods.md


class Crops(Settings):
    """Random resized crops of one size."""

    size: int = Field(gt=0, description="side in pixels; a multiple of the ViT's patch")
    count: int = Field(ge=0, description="crops of an image")
    scale: Range = Field(description="area of a crop as a fraction of the image's")


def check_crops(global_crops: Crops, local_crops: Crops) -> None:
    """For methods in which a crop predicts another one, the target being a global one.

    Raises:
        ValueError: if there are too few crops for that.
    """
    if global_crops.count < 1:
        raise ValueError("global_crops.count: targets are of global crops; give at least 1")
    if global_crops.count + local_crops.count < 2:
        raise ValueError("global_crops.count, local_crops.count: a crop predicts another one; give at least 2 in all")


class HeadSettings(Settings):
    """A projection head: an MLP of three layers, l2-normalisation, and scores against prototypes.

    Source: docs/methods.md#projection-head.
    """

    prototypes: int = Field(gt=0, description="K, the number of scores")
    hidden: int = Field(2048, gt=0, description="width of the two hidden layers")
    bottleneck: int = Field(256, gt=0, description="width of the l2-normalised embedding")
    fixed_gain: bool = Field(True, description="prototypes have length 1 (DINO's norm_last_layer)")


class DenseSettings(Settings):
    """Alignment of patches in Leopart's order: Sinkhorn on the whole target grid, then RoIAlign to the overlap.

    Source: docs/methods.md#dense-alignment.
    """

    temperature: float = Field(0.1, gt=0, description="of the student's softmax")
    epsilon: float = Field(0.05, gt=0, description="of Sinkhorn-Knopp on the teacher's scores; smaller is harder")
    iterations: int = Field(3, ge=1, description="of Sinkhorn-Knopp")
    grid: int = Field(7, ge=1, description="an overlap is resampled to this many cells a side")


class TeacherSettings(Settings):
    """The teacher's momentum: a cosine from `momentum` to `momentum_end` over the training.

    Source: docs/methods.md#ema-and-schedules.
    """

    momentum: float = Field(0.996, ge=0, le=1)
    momentum_end: float = Field(1.0, ge=0, le=1)


class TeacherTemperature(Settings):
    """The teacher's temperature: linear from `start` to `end` in the first epochs, then constant.

    Source: docs/methods.md#ema-and-schedules.
    """

    start: float = Field(0.04, gt=0)
    end: float = Field(0.07, gt=0)
    epochs: int = Field(30, ge=0, description="warm-up epochs")
