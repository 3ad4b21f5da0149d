"""What a config says about `byol`: predict the moving average's projection of the other view. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from stages.pretrain.config.parts import TeacherSettings
from stages.pretrain.methods.hosts.settings.two_view import MLPSettings, TwoViewSettings, at_least_two

if TYPE_CHECKING:
    from stages.models.encoder import Encoder
    from stages.pretrain.methods.method import Method


class BYOLSettings(TwoViewSettings):
    """BYOL (methods.md 2.7)."""

    terms: ClassVar[tuple[str, ...]] = ("byol",)

    name: str = "byol"
    projector: MLPSettings = MLPSettings(hidden=4096, out=256)
    predictor_hidden: int = Field(4096, gt=0)
    teacher: TeacherSettings = TeacherSettings(momentum=0.996)

    def build(self, encoder: Encoder, *, total_steps: int, steps_per_epoch: int, global_batch: int) -> Method:
        from stages.pretrain.methods.hosts.byol import BYOL

        at_least_two(global_batch, self.name)
        return BYOL(self, encoder)
