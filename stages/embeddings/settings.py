"""What the stages of this room are told. Imports no torch, because planning reads this file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from pipeline.stage import Feed, Input, StageConfig
from stages.models.planned import backbone_of
from stages.models.settings import Backbone


class FrozenEncoderConfig(StageConfig):
    """Whose features, of which images."""

    images: Input["images"]
    encoder: Input["encoder"] | None = Field(None, description="an earlier pretrain stage; or give a backbone")
    backbone: Backbone | None = Field(None, description="a timm model or a checkpoint file; or name an encoder")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the forward pass")
    seed: int = Field(0, description="of the random weights of a backbone that has no others")

    @model_validator(mode="after")
    def _one_origin(self) -> FrozenEncoderConfig:
        if (self.encoder is None) == (self.backbone is None):
            raise ValueError("exactly one of encoder and backbone says where features come from; set one of them")
        return self

    def whose(self, feeds: Mapping[str, Feed]) -> Backbone | None:
        """The backbone, its own or its encoder's, as far as the pipeline file tells."""
        return self.backbone or backbone_of(feeds.get("encoder"))


class EmbeddingsConfig(FrozenEncoderConfig):
    """Whose vectors, of which part of an image."""

    pooling: Literal["cls", "mean"] = Field("cls", description="[CLS] (token mean where there is none), or map mean")
    resize: int = Field(256, gt=0, description="short side in pixels before the crop")
    crop: int = Field(224, gt=0, description="side in pixels of the central square that is encoded")

    @model_validator(mode="after")
    def _crop_fits(self) -> EmbeddingsConfig:
        if self.crop > self.resize:
            raise ValueError(f"crop {self.crop} is larger than resize {self.resize}; lower crop or raise resize")
        return self


class FeaturesConfig(FrozenEncoderConfig):
    """Whose features, at which size of an image."""

    size: int = Field(224, gt=0, description="pixels; a side of what is encoded, or the root of its area (fit: aspect)")
    fit: Literal["squeeze", "aspect", "centre"] = Field(
        "squeeze",
        description="squeeze: the whole image as a square, as segment_linear tests; aspect: the whole image with its "
        "aspect, sides in whole patches; centre: the central square of an image whose short side is 8/7 of size, as "
        "classify_knn",
    )
    layer: int | None = Field(
        None,
        ge=0,
        description="the map of one block (ViT, from 0) or level (ResNet, Swin and others with levels of several "
        "strides, 1 to 4), without the filter, and its mean; default: what evaluations see",
    )
