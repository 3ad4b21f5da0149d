"""What a pipeline file says about a `segment_linear` stage. Nothing heavy is imported: planning reads this file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.stage import Input, StageConfig


class SegmentLinearConfig(StageConfig):
    """The protocol's numbers: sizes and crops of the images, training of the linear layer, scoring."""

    images: Input["images"] = Field(description="with masks and splits")
    encoder: Input["encoder"]
    train_split: str = Field("train", description="the images that the linear layer learns from")
    test_split: str = Field("val", description="the images it is scored on")
    train_size: int = Field(336, gt=0, description="side in pixels of a training crop (a multiple of the patch)")
    test_size: int = Field(448, gt=0, description="side in pixels that a whole test image is resized to")
    crops: int = Field(1, ge=0, description="random crops of a train image, encoded once; 0: the whole image, resized")
    crop_scale: tuple[float, float] = Field((0.8, 1.0), description="area of a crop as a fraction of the image's")
    label_size: int = Field(
        100, gt=0, description="side at which logits and masks meet in training; tests use all pixels"
    )
    samples: int = Field(100_000, gt=0, description="training images in all, repeats included")
    batch_size: int = Field(128, gt=0)
    lr: float | list[float] = Field(
        3e-3, description="Adam's; of a list, the best on a held-out fifth of the train images (paper: 1e-4 to 1e-2)"
    )
    absent: Literal["skip", "zero"] = Field("skip", description="a class in neither truth nor prediction, in the mean")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the encoder's forward pass")
    random_baseline: bool = Field(True, description="also for a randomly initialised encoder of the same shape")
    seed: int = Field(0, description="of crops, the linear layer, the order of images and the random encoder")

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
        return self
