"""What a pipeline file says about a `segment_linear` stage. Nothing heavy is imported: planning reads this file.

Options of the protocol's variants are left out of a dump where they are not set (`exclude_if`), and so out of the
fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import Field, model_validator

from pipeline.stage import Input, Settings, StageConfig


def _is(default: object) -> Callable[[object], bool]:
    return lambda value: value == default


class ProbeTraining(Settings):
    """How the decoder is trained, where it is not Adam at a constant rate."""

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD's")
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["constant", "step", "cosine", "linear"] = Field(
        "constant", description="of the learning rate; step: a tenth of it from step_at on; cosine, linear: to final_lr"
    )
    step_at: float = Field(0.8, gt=0, lt=1, description="of the training, where schedule is step")
    final_lr: float = Field(0.0, ge=0, description="where schedule is cosine or linear")
    warmup: int = Field(0, ge=0, description="samples over which the rate rises from 0 at the beginning")


class SegmentLinearConfig(StageConfig):
    """The protocol's numbers: sizes and crops of the images, training of the linear layer, scoring."""

    images: Input["images"] = Field(description="with masks and splits")
    encoder: Input["encoder"]
    train_split: str = Field("train", description="the images that the decoder learns from")
    test_split: str = Field("val", description="the images it is scored on")
    train_size: int = Field(336, gt=0, description="side in pixels of a training crop (a multiple of the patch)")
    test_size: int = Field(448, gt=0, description="side in pixels that a whole test image is resized to")
    crops: int = Field(1, ge=0, description="random crops of a train image, encoded once; 0: the whole image, resized")
    crop_scale: tuple[float, float] = Field((0.8, 1.0), description="area of a crop as a fraction of the image's")
    label_size: int = Field(
        100, gt=0, description="side at which logits and masks meet in training; tests use all pixels"
    )
    samples: int = Field(100_000, gt=0, description="training images in all, repeats included")
    epochs: int | None = Field(
        None, ge=1, exclude_if=_is(None), description="passes over the cached crops, in place of samples"
    )
    batch_size: int = Field(128, gt=0)
    lr: float | list[float] = Field(
        3e-3, description="peak rate; of a list, the best on a held-out fifth of the train images (paper: 1e-4 to 1e-2)"
    )
    decoder: Literal["linear", "batch_norm", "fcn"] = Field(
        "linear",
        exclude_if=_is("linear"),
        description="a 1x1 convolution, the same behind a batch norm, or CoTAP's three blocks of convolutions",
    )
    fcn_width: int = Field(256, ge=1, exclude_if=_is(256), description="channels of the FCN's blocks")
    dropout: float = Field(
        0.0, ge=0, lt=1, exclude_if=_is(0.0), description="of whole channels before the last convolution"
    )
    training: ProbeTraining | None = Field(
        None, exclude_if=_is(None), description="optimiser and schedule; default: Adam at a constant rate"
    )
    zoom: tuple[float, float] | None = Field(
        None,
        exclude_if=_is(None),
        description="square crops without distortion, of an image whose short side is drawn within these multiples of "
        "the crop's (below 1: the rest is padding and void); default: crop_scale",
    )
    slide: int | None = Field(
        None,
        ge=1,
        exclude_if=_is(None),
        description="test by windows of test_size, so many pixels apart, on an image whose short side is test_size; "
        "default: the whole image resized",
    )
    score_size: int | None = Field(
        None, ge=1, exclude_if=_is(None), description="side that test masks are resized to; default: as they are"
    )
    absent: Literal["skip", "zero"] = Field("skip", description="a class in neither truth nor prediction, in the mean")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the encoder's forward pass")
    random_baseline: bool = Field(True, description="also for a randomly initialised encoder of the same shape")
    seed: int = Field(0, description="of crops, the decoder, the order of images and the random encoder")

    @property
    def learning_rates(self) -> list[float]:
        """All of `lr`, as a list also where it is one number."""
        return self.lr if isinstance(self.lr, list) else [self.lr]

    @model_validator(mode="after")
    def _rules(self) -> SegmentLinearConfig:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale {list(self.crop_scale)} must rise within (0, 1]")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(f"lr {self.lr} must be a positive number, or a list of them")
        if self.zoom is not None and not 0 < self.zoom[0] <= self.zoom[1]:
            raise ValueError(f"zoom {list(self.zoom)} must rise, above 0")
        if self.zoom is not None and not self.crops:
            raise ValueError("zoom is of random crops, and crops is 0: set it to 1 or more")
        if self.slide is not None and self.slide > self.test_size:
            raise ValueError(f"slide {self.slide} leaves gaps between windows of test_size {self.test_size}: lower it")
        return self
