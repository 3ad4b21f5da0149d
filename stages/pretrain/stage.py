"""The `pretrain` stage: images in, an encoder out. What it can be told; the work is in launch.py.

Torch and Ray are imported when it runs, not before: planning reads this file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from pipeline.stage import Context, Feed, Input, Outcome, Settings, Stage, StageConfig
from stages.models.settings import Backbone
from stages.pretrain.config.method import MethodSettings, method_settings
from stages.training.settings import LoopSettings


class ImageSource(Settings):
    """One of several mixed image sources."""

    from_: Input["images"] = Field(alias="from")
    weight: float = Field(1.0, gt=0, description="share of every batch, relative to the other sources")
    role: Literal["objects", "scenes"] = Field(
        "objects", description="objects: one main object a picture; a method may limit a term to these"
    )


class PretrainConfig(LoopSettings, StageConfig):
    images: Input["images"] | list[ImageSource] = Field(description="a stage, or several with weights")
    split: str | None = Field(
        None, description="train on this split only; default: 'train' where the images have one, else all"
    )
    init: Input["encoder"] | None = Field(None, description="start from this encoder; else from `backbone`")
    backbone: Backbone | None = None
    method: Annotated[SerializeAsAny[MethodSettings], BeforeValidator(method_settings)]

    @model_validator(mode="after")
    def _one_start(self) -> PretrainConfig:
        if (self.init is None) == (self.backbone is None):
            raise ValueError("init, backbone: give exactly one of the two")
        return self

    def image_sources(self) -> list[tuple[str, ImageSource]]:
        """Dotted path of the input and the source, in order."""
        if isinstance(self.images, str):
            return [("images", ImageSource.model_validate({"from": self.images}))]
        return [(f"images.{i}.from", source) for i, source in enumerate(self.images)]


class Pretrain(Stage[PretrainConfig]):
    """Pre-trains with one of the methods, on Ray Train, and writes the encoder with its curves."""

    kind = "encoder"
    version = 1
    tracked_as = "model"
    exports = ("encoder.safetensors", "encoder.json", "*.safetensors")
    Config = PretrainConfig

    @property
    def uses_ray(self) -> bool:  # type: ignore[override]
        """resources.workers: 0 trains in the driver's own process and needs no Ray."""
        return self.config.resources.workers != 0

    def mismatches(self, feeds: Mapping[str, Feed]) -> Iterator[tuple[str, str, str]]:
        """A table (boxes, superpixels, neighbours, embeddings) must describe one of the image sets trained on."""
        sources = {path for path, _ in self.config.image_sources()}
        trained_on = {feeds[path].fingerprint: feeds[path].stage for path in feeds if path in sources}
        for path, feed in feeds.items():
            origins = {} if path in sources or feed.kind == "encoder" else _image_sets(feed)
            if origins and not origins.keys() & trained_on.keys():
                yield (
                    path,
                    f"{feed.stage} is made from the images of {', '.join(origins.values())}, and this stage trains on "
                    f"those of {', '.join(trained_on.values())}",
                    f"name a {feed.kind} stage that is made from the same images",
                )

    def run(self, context: Context) -> Outcome:
        from stages.pretrain.launch.launch import pretrain

        return pretrain(self.config, context)


def _image_sets(feed: Feed) -> dict[str, str]:
    """The image sets that a table describes: fingerprint -> stage. What an encoder was trained on is not among them."""
    if feed.kind == "images":
        return {feed.fingerprint: feed.stage}
    found: dict[str, str] = {}
    for above in feed.inputs.values():
        if above.kind != "encoder":
            found |= _image_sets(above)
    return found
