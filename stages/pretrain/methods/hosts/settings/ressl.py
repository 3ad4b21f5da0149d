"""What a config says about `ressl`. Free of torch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from stages.pretrain.config.method import QueueSize
from stages.pretrain.config.parts import Export, Range, TeacherSettings
from stages.pretrain.methods.hosts.settings.two_view import MLPSettings, TwoViewSettings


class ReSSLSettings(TwoViewSettings):
    """ReSSL: similarities to earlier images agree. The student sees a strong view, the teacher a weak one.

    Source: docs/methods.md#ressl.
    """

    builds: ClassVar[str] = "stages.pretrain.methods.hosts.ressl:ReSSL"
    terms: ClassVar[tuple[str, ...]] = ("ressl",)

    name: str = "ressl"
    scale: Range = Field((0.2, 1.0), description="area of a crop as a fraction of the image's")
    tau_student: float = Field(0.1, gt=0, description="temperature of the student's similarities")
    tau_teacher: float = Field(0.04, gt=0, description="temperature of the teacher's similarities")
    queue: int = Field(131072, ge=1, description="teacher features of earlier batches; 16384 to 131072")
    projector: MLPSettings = MLPSettings(hidden=4096, out=512)
    teacher: TeacherSettings = TeacherSettings(momentum=0.999, momentum_end=0.999)
    export: Export = Field("student", description="whose encoder is evaluated; student as in the paper")

    def queues(self) -> dict[str, QueueSize]:
        """One, of the teacher's projections."""
        return {"queue": QueueSize(self.queue)}
