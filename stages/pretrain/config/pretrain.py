"""What a config says about the `pretrain` stage. Free of torch, because making a plan reads it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, SerializeAsAny, model_validator

from pipeline.stage import Input, Settings
from stages.models.settings import Backbone
from stages.pretrain.config.method import MethodSettings, method_settings
from stages.training.settings import TrainingConfig


class SourceSettings(Settings):
    """One of several image sources that are mixed in a batch."""

    from_: Input["images"] = Field(alias="from")
    weight: float = Field(1.0, gt=0, description="share of every batch, relative to the other sources")
    role: Literal["objects", "scenes"] = Field(
        "objects",
        description="objects: images of one main object; scenes: of several; a method may limit a term to objects",
    )


def _exactly_one(*fields: str) -> dict[str, Any]:
    """The JSON schema of a mapping that sets one of these fields: the rules below, for editors."""
    return {"oneOf": [{"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in fields]}


class PretrainConfig(TrainingConfig):
    """The images, the encoder or backbone to start from, the method, and how to train."""

    model_config = ConfigDict(
        json_schema_extra={"allOf": [_exactly_one("init", "backbone"), _exactly_one("epochs", "steps")]}
    )

    images: Input["images"] | list[SourceSettings] = Field(description="a stage, or several with weights")
    split: str | None = Field(
        None, description="train on this split only; default: 'train' where the images have one, else all"
    )
    init: Input["encoder"] | None = Field(None, description="start from this encoder; else from `backbone`")
    backbone: Backbone | None = None
    method: Annotated[SerializeAsAny[MethodSettings], BeforeValidator(method_settings)]
    continue_: Input["encoder"] | None = Field(
        None,
        alias="continue",
        description="go on with the training of this pretrain stage, which must have keep_state and the same settings; "
        "epochs or steps are those of both together, and the schedules those of one training of that length",
    )
    keep_state: bool = Field(
        False,
        description="put heads, optimiser and queues into the artifact, several times the encoder's size, so that a "
        "later stage can `continue` this training",
    )
    renderer: Literal["auto", "cpu", "gpu"] = Field(
        "auto", description="what makes the views: OpenCV in loader processes, or torch on the GPU"
    )

    @model_validator(mode="after")
    def _one_start(self) -> PretrainConfig:
        if (self.init is None) == (self.backbone is None):
            raise ValueError("init, backbone: give exactly one of the two")
        return self

    def image_sources(self) -> list[tuple[str, SourceSettings]]:
        """The image sources in order, each with the dotted path of its input in the config."""
        if isinstance(self.images, str):
            return [("images", SourceSettings.model_validate({"from": self.images}))]
        return [(f"images.{i}.from", source) for i, source in enumerate(self.images)]
