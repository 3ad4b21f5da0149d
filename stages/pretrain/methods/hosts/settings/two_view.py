"""Settings that several hosts share: two views, and the layers of a projector. Free of torch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from pipeline.stage import Settings
from stages.pretrain.config.method import MethodSettings
from stages.pretrain.config.parts import Range


class MLPSettings(Settings):
    """The layers of a projector: width -> hidden -> ... -> out.

    Source: docs/methods.md#mlps-of-two-view-methods.
    """

    hidden: int = Field(2048, gt=0, description="width of the hidden layers")
    out: int = Field(128, gt=0, description="width of the projection")
    layers: int = Field(2, ge=1, description="linear layers")

    def widths(self, width: int) -> list[int]:
        """The widths of the input, the hidden layers and the output."""
        return [width, *[self.hidden] * (self.layers - 1), self.out]


class TwoViewSettings(MethodSettings):
    """Two random resized crops of an image.

    Source: docs/methods.md#views-of-two-view-methods.
    """

    projects_views: ClassVar[bool] = True

    size: int = Field(224, gt=0, description="side of a view in pixels; a multiple of the ViT's patch")
    scale: Range = Field((0.08, 1.0), description="area of a crop as a fraction of the image's")
    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")

    def least_batch(self) -> int:
        """2, because these methods compare the images of a batch, or normalise over them."""
        return 2
