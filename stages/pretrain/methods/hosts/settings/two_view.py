"""Settings that the two-view methods share: the views and the projector. Torch-free."""

from __future__ import annotations

from pydantic import Field

from pipeline.stage import Settings
from stages.pretrain.config.method import MethodSettings
from stages.pretrain.config.parts import Range


class MLPSettings(Settings):
    """width -> hidden -> ... -> out."""

    hidden: int = Field(2048, gt=0)
    out: int = Field(128, gt=0)
    layers: int = Field(2, ge=1, description="linear layers")

    def widths(self, width: int) -> list[int]:
        """Of the input, the hidden layers and the output."""
        return [width, *[self.hidden] * (self.layers - 1), self.out]


class TwoViewSettings(MethodSettings):
    """Two random resized crops of an image."""

    size: int = Field(224, gt=0, description="side of a view in pixels; a multiple of the ViT's patch")
    scale: Range = Field((0.08, 1.0), description="area of a crop as a fraction of the image's")
    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")

    def least_batch(self) -> int:
        """Two: these methods compare the images of a batch, or normalise over them."""
        return 2
