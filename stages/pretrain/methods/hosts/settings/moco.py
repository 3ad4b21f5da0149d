"""What a config says about `moco`, versions 2 and 3. Free of torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from stages.pretrain.config.method import QueueSize
from stages.pretrain.config.parts import Export, Range, TeacherSettings
from stages.pretrain.methods.hosts.settings.two_view import MLPSettings, TwoViewSettings


class MoCoSettings(TwoViewSettings):
    """MoCo: a query against the keys of a moving average, from a queue (v2) or from the batch (v3).

    Defaults that a config leaves out follow `version`.

    Source: docs/methods.md#moco.
    """

    terms: ClassVar[tuple[str, ...]] = ("moco",)

    name: str = "moco"
    version: Literal["v2", "v3"] = Field("v2", description="v2: queue, one direction; v3: predictor, both directions")
    scale: Range = Field((0.2, 1.0), description="area of a crop as a fraction of the image's")
    temperature: float | None = Field(None, gt=0, description="default: v2 0.2; v3 0.2 for a ViT, 1.0 for a ResNet")
    queue: int = Field(65536, ge=1, description="v2: keys of earlier batches")
    projector: MLPSettings | None = Field(
        None, description="default: v2 2048-128 without batch norm; v3 4096-256, of 3 layers for a ViT, else 2"
    )
    predictor_hidden: int = Field(4096, gt=0, description="v3")
    teacher: TeacherSettings | None = Field(None, description="default: v2 0.999, constant; v3 0.99 rising to 1")
    export: Export = Field("student", description="whose encoder is evaluated; student as in the paper")

    @property
    def builds(self) -> str:  # type: ignore[override]
        """The class of this version."""
        return f"stages.pretrain.methods.hosts.moco:{'MoCoV2' if self.version == 'v2' else 'MoCoV3'}"

    def least_batch(self) -> int:
        """1 for version 2, which compares with its queue; 2 for version 3, which compares the images of a batch."""
        return 1 if self.version == "v2" else 2

    def over_one_pass(self) -> tuple[str, ...]:
        """Version 3 has no queue."""
        return () if self.version == "v2" else ("the keys of other images",)

    def queues(self) -> dict[str, QueueSize]:
        """Version 2 has one, of keys."""
        return {"queue": QueueSize(self.queue)} if self.version == "v2" else {}
