"""What a config says about `mae`. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from pipeline.stage import Settings
from stages.pretrain.config.method import MethodSettings, Start
from stages.pretrain.config.parts import Range


class MAEDecoderSettings(Settings):
    """The transformer that predicts the removed patches; dropped after training."""

    width: int = Field(512, gt=0, multiple_of=4)
    blocks: int = Field(8, ge=1)
    heads: int = Field(16, gt=0)


class MAESettings(MethodSettings):
    """MAE: rebuilds an image from a quarter of its patches; for ViTs only.

    Source: docs/methods.md#mae.
    """

    builds: ClassVar[str] = "stages.pretrain.methods.hosts.mae:MAE"
    terms: ClassVar[tuple[str, ...]] = ("mae",)

    name: str = "mae"
    size: int = Field(224, gt=0, description="side of a view in pixels; a multiple of the patch")
    scale: Range = Field((0.2, 1.0), description="area of a crop as a fraction of the image's")
    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    mask_ratio: float = Field(0.75, gt=0, lt=1, description="share of the patches that is removed")
    masks: int = Field(1, ge=1, description="masks of each image a step; DSA compares two and asks for them itself")
    normalise_targets: bool = Field(True, description="every patch's pixels to mean 0 and variance 1")
    decoder: MAEDecoderSettings = MAEDecoderSettings()

    def as_host(self) -> MAESettings:
        """With at least two masks of each image, which are the two views that DSA compares."""
        return self.model_copy(update={"masks": max(2, self.masks)})

    def misfits(self, start: Start) -> Iterator[tuple[str, str, str]]:
        """Patches can be left out of a plain ViT only, without a filter that reads the whole map."""
        yield from super().misfits(start)
        if start.backbone.is_vit is False:
            yield "name", f"mae leaves patches out, which {start.backbone.name} cannot do", "name a vit_ backbone"
        elif start.filtered:
            yield "name", "mae leaves patches out, and the filter of init needs them all", "name an init without one"
