"""What a config says about `dino`: self-distillation of whole images with crops of two sizes. Free of torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from stages.pretrain.config.method import MethodSettings
from stages.pretrain.config.parts import (
    Crops,
    Export,
    HeadSettings,
    TeacherSettings,
    TeacherTemperature,
    check_crops,
)


class DinoSettings(MethodSettings):
    """DINO. Defaults are the official ones; give small trainings fewer `head.prototypes`.

    Source: docs/methods.md#dino.
    """

    builds: ClassVar[str] = "stages.pretrain.methods.dino.method:Dino"
    terms: ClassVar[tuple[str, ...]] = ("align_image",)
    shards: ClassVar[bool] = True

    name: str = "dino"
    global_crops: Crops = Crops(size=224, count=2, scale=(0.4, 1.0))
    local_crops: Crops = Crops(size=96, count=8, scale=(0.05, 0.4))
    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    head: HeadSettings = HeadSettings(prototypes=65536)
    freeze_last_layer: int = Field(1, ge=0, description="epochs in which the image head's prototypes are not trained")
    student_temperature: float = Field(0.1, gt=0)
    teacher_temperature: TeacherTemperature = TeacherTemperature()
    centering: Literal["centre", "sinkhorn"] = Field(
        "centre", description="centre: DINO's moving mean; sinkhorn: 3 iterations, the temperature as epsilon (DINOv2)"
    )
    center_momentum: float = Field(0.9, ge=0, le=1)
    teacher: TeacherSettings = TeacherSettings()
    export: Export = Field("teacher", description="whose encoder is evaluated; teacher as in the official code")

    @model_validator(mode="after")
    def _enough_crops(self) -> DinoSettings:
        check_crops(self.global_crops, self.local_crops)
        return self

    def over_one_pass(self) -> tuple[str, ...]:
        """Sinkhorn's assignments; the centre moves by the mean of all passes."""
        return ("Sinkhorn's assignments of images",) if self.centering == "sinkhorn" else ()
