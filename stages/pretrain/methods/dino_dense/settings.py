"""What a config says about `dino_dense`: DINO plus alignment of patches over the crops' overlap. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pipeline.stage import Settings
from stages.pretrain.config.parts import Crops, HeadSettings
from stages.pretrain.methods.dino.settings import DinoSettings

if TYPE_CHECKING:
    from stages.models.encoder import Encoder
    from stages.pretrain.methods.method import Method


class DenseSettings(Settings):
    """Alignment of patches in Leopart's order (methods.md 1.4): Sinkhorn on the target grid, then RoIAlign."""

    temperature: float = Field(0.1, gt=0, description="of the student's softmax")
    epsilon: float = Field(0.05, gt=0, description="of Sinkhorn on the teacher's scores")
    iterations: int = Field(3, ge=1, description="of Sinkhorn")
    grid: int = Field(7, ge=1, description="cells a side that an overlap is resampled to")


class DinoDenseSettings(DinoSettings):
    """`dino` plus the term align_patch. Crops as Leopart's: no flip, overlaps of at least 1 and 2 % of the image."""

    terms: ClassVar[tuple[str, ...]] = ("align_image", "align_patch")

    name: str = "dino_dense"
    global_crops: Crops = Crops(size=224, count=2, scale=(0.25, 1.0))
    local_crops: Crops = Crops(size=96, count=4, scale=(0.05, 0.25))
    flip: float = Field(0.0, ge=0, le=1, description="probability of a horizontal flip; regions are mirrored back")
    dense_head: HeadSettings = HeadSettings(prototypes=300)
    dense: DenseSettings = DenseSettings()

    def build(self, encoder: Encoder, *, total_steps: int, steps_per_epoch: int, global_batch: int) -> Method:
        from stages.pretrain.methods.dino_dense.method import DinoDense

        return DinoDense(self, encoder)
