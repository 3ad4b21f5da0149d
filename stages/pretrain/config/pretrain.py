"""What a config says about the `pretrain` stage. Torch-free: planning reads this file, and so do the workers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from pipeline.stage import Input, Settings, StageConfig
from stages.models.settings import Backbone
from stages.pretrain.config.method import MethodSettings, method_settings
from stages.training.settings import LoopSettings


class SourceSettings(Settings):
    """One of several mixed image sources."""

    from_: Input["images"] = Field(alias="from")
    weight: float = Field(1.0, gt=0, description="share of every batch, relative to the other sources")
    role: Literal["objects", "scenes"] = Field(
        "objects", description="objects: one main object a picture; a method may limit a term to these"
    )


class PretrainConfig(LoopSettings, StageConfig):
    """Images, a start (an encoder or a backbone), a method, and how to train."""

    images: Input["images"] | list[SourceSettings] = Field(description="a stage, or several with weights")
    split: str | None = Field(
        None, description="train on this split only; default: 'train' where the images have one, else all"
    )
    init: Input["encoder"] | None = Field(None, description="start from this encoder; else from `backbone`")
    backbone: Backbone | None = None
    method: Annotated[SerializeAsAny[MethodSettings], BeforeValidator(method_settings)]
    renderer: Literal["auto", "cpu", "gpu"] = Field(
        "auto", description="what makes the views: OpenCV in loader processes, or torch on the GPU"
    )

    @model_validator(mode="after")
    def _one_start(self) -> PretrainConfig:
        if (self.init is None) == (self.backbone is None):
            raise ValueError("init, backbone: give exactly one of the two")
        return self

    def image_sources(self) -> list[tuple[str, SourceSettings]]:
        """Dotted path of the input and the source, in order."""
        if isinstance(self.images, str):
            return [("images", SourceSettings.model_validate({"from": self.images}))]
        return [(f"images.{i}.from", source) for i, source in enumerate(self.images)]
