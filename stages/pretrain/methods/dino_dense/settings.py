"""What a config says about `dino_dense`: DINO plus alignment of patches where crops overlap. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from stages.models.planned import too_coarse
from stages.pretrain.config.method import Start
from stages.pretrain.config.parts import Crops, DenseSettings, HeadSettings
from stages.pretrain.methods.dino.settings import DinoSettings


class DinoDenseSettings(DinoSettings):
    """`dino` plus the term align_patch.

    The crops are Leopart's: no flip, overlaps of at least 1 % (local with global) and 2 % (two global) of the image.

    Source: docs/methods.md#dino-dense.
    """

    builds: ClassVar[str] = "stages.pretrain.methods.dino_dense.method:DinoDense"
    terms: ClassVar[tuple[str, ...]] = ("align_image", "align_patch")

    name: str = "dino_dense"
    global_crops: Crops = Crops(size=224, count=2, scale=(0.25, 1.0))
    local_crops: Crops = Crops(size=96, count=4, scale=(0.05, 0.25))
    flip: float = Field(0.0, ge=0, le=1, description="probability of a horizontal flip; regions are mirrored back")
    dense_head: HeadSettings = HeadSettings(prototypes=300)
    dense: DenseSettings = DenseSettings()

    def misfits(self, start: Start) -> Iterator[tuple[str, str, str]]:
        """Terms of patches need some."""
        yield from super().misfits(start)
        if self.uses("align_patch"):
            sizes = {"global_crops.size": self.global_crops.size}
            yield from too_coarse(start.backbone, sizes, 2, "the term align_patch")

    def over_one_pass(self) -> tuple[str, ...]:
        """The same for patches, always."""
        return (*super().over_one_pass(), "Sinkhorn's assignments of patches")
