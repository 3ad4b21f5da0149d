"""The `finetune_segmentation` stage: an encoder trained with a decoder on masks, scored by mIoU.

Source: docs/methods.md#fine-tuned-segmentation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import Field, model_validator

from pipeline.stage import Feed
from stages.data.requirements import Mismatch, single_class
from stages.finetune.settings import FinetuneConfig, Range
from stages.finetune.stage import Finetune
from stages.models.planned import backbone_of


class SegmentationConfig(FinetuneConfig):
    """The decoder, crops at several scales, and how whole images are tested."""

    batch_size: int = Field(16, ge=1, description="images of one optimiser step, over all ranks and passes")
    decoder: Literal["linear", "fpn", "upernet"] = Field(
        "linear", description="on the encoder's map: batch norm and a linear layer; or semantic FPN or UPerNet"
    )
    taps: list[int] | None = Field(
        None,
        description="fpn, upernet: where their four maps come from: a ViT's blocks counted from 0, a ResNet's stages "
        "counted from 1; default: four evenly spaced blocks, all stages",
    )
    width: int | None = Field(None, gt=0, description="channels of fpn or upernet; default: 128, 512")
    auxiliary: float = Field(
        0.4, ge=0, description="upernet: weight of the loss of a second head on the third map; 0: none"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="of channels, before the last layer")
    size: int = Field(512, gt=0, description="side in pixels of a training crop, and of a window of the test")
    scale: Range = Field(
        (0.5, 2.0), description="a training image's short side, before it is cropped, as a multiple of size"
    )
    max_class_share: float = Field(
        0.75, gt=0, le=1, description="share of a crop's pixels of one class above which another is drawn, up to ten"
    )
    test_resize: int | None = Field(None, gt=0, description="short side of a test image; default: size")
    test: Literal["slide", "whole"] = Field("slide", description="windows of `size` over the image, or all at once")
    test_stride: int | None = Field(None, gt=0, description="slide: between windows; default: two thirds of size")
    absent: Literal["skip", "zero"] = Field("skip", description="a class in neither truth nor prediction, in the mean")

    @model_validator(mode="after")
    def _rules(self) -> SegmentationConfig:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale {list(self.scale)} must be positive and rise")
        if self.taps is not None and (self.decoder == "linear" or len(self.taps) != 4):
            raise ValueError(f"taps {self.taps}: fpn and upernet read four maps; linear reads the encoder's own")
        if self.decoder == "linear" and self.width is not None:
            raise ValueError("width: a linear decoder has none")
        if self.test_stride is not None and self.test_stride > self.size:
            raise ValueError(f"test_stride: {self.test_stride} leaves pixels between windows of {self.size}")
        return self


class FinetuneSegmentation(Finetune[SegmentationConfig]):
    """images + encoder -> encoder, with metrics miou, pixel_accuracy, mean_accuracy in per cent, one row a class."""

    units = dict.fromkeys(("miou", "pixel_accuracy", "mean_accuracy"), "%")
    objectives = dict.fromkeys(("miou", "pixel_accuracy", "mean_accuracy"), "max")
    needs = "masks"
    work = "stages.finetune.segmentation_work:SegmentationWork"
    sizes = ("size",)
    Config = SegmentationConfig

    def mismatches(self, feeds: Mapping[str, Feed]) -> Iterator[Mismatch]:
        """Also masks of one class, a decoder that cannot read the encoder, and too few images for its batch norms."""
        yield from super().mismatches(feeds)
        yield from single_class(feeds["images"], {"train_split": self.config.train_split})
        backbone = backbone_of(feeds.get("encoder"))
        if self.config.decoder == "upernet" and self.config.batch_size == self.config.accumulate:
            yield (
                "batch_size",
                "a forward pass has 1 image, and UPerNet's batch norms need several",
                "raise batch_size, or lower accumulate",
            )
        if self.config.taps is None or backbone is None:
            return
        if backbone.is_vit is False and not {*self.config.taps} <= {1, 2, 3, 4}:
            yield "taps", f"{self.config.taps} of {backbone.name}, which has the stages 1 to 4", "name these, or none"
