"""What a config says about `byol`. Free of torch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from stages.pretrain.config.parts import Export, TeacherSettings
from stages.pretrain.methods.hosts.settings.two_view import MLPSettings, TwoViewSettings


class BYOLSettings(TwoViewSettings):
    """BYOL: predicts the moving average's projection of the other view.

    Source: docs/methods.md#byol.
    """

    builds: ClassVar[str] = "stages.pretrain.methods.hosts.byol:BYOL"
    terms: ClassVar[tuple[str, ...]] = ("byol",)

    name: str = "byol"
    projector: MLPSettings = MLPSettings(hidden=4096, out=256)
    predictor_hidden: int = Field(4096, gt=0, description="width of the predictor's hidden layer")
    teacher: TeacherSettings = TeacherSettings(momentum=0.996)
    export: Export = Field("student", description="whose encoder is evaluated; student as in the paper")
