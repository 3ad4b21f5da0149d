"""What a config says about `swav`. Free of torch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from stages.pretrain.config.method import MethodSettings, QueueSize
from stages.pretrain.config.parts import Crops, check_crops
from stages.pretrain.methods.hosts.settings.two_view import MLPSettings


class SwAVSettings(MethodSettings):
    """SwAV: crops predict each other's balanced assignments to prototypes.

    Source: docs/methods.md#swav.
    """

    builds: ClassVar[str] = "stages.pretrain.methods.hosts.swav:SwAV"
    terms: ClassVar[tuple[str, ...]] = ("swav",)

    name: str = "swav"
    global_crops: Crops = Crops(size=224, count=2, scale=(0.14, 1.0))
    local_crops: Crops = Crops(size=96, count=6, scale=(0.05, 0.14))
    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    projector: MLPSettings = MLPSettings(hidden=2048, out=128)
    prototypes: int = Field(3000, gt=0, description="K")
    freeze_prototypes: int = Field(313, ge=0, description="optimiser steps in which the prototypes are not trained")
    temperature: float = Field(0.1, gt=0, description="of the predictions")
    epsilon: float = Field(0.05, gt=0, description="of Sinkhorn")
    iterations: int = Field(3, ge=1, description="of Sinkhorn")
    queue: int = Field(
        3840,
        ge=0,
        description="embeddings of each large crop that Sinkhorn balances over too; 0: none. Each rank takes a "
        "share, so the number of ranks must divide it",
    )
    queue_from_epoch: int = Field(15, ge=0, description="it fills from here on, and is used once full")

    @model_validator(mode="after")
    def _enough_crops(self) -> SwAVSettings:
        check_crops(self.global_crops, self.local_crops)
        return self

    def least_batch(self) -> int:
        """2, because assignments are balanced over the images of a batch."""
        return 2

    def over_one_pass(self) -> tuple[str, ...]:
        """Assignments are balanced over the images of a pass and the queue."""
        return ("Sinkhorn's assignments",)

    def queues(self) -> dict[str, QueueSize]:
        """One for each large crop, of embeddings; each rank balances its share of it."""
        return {"queue": QueueSize(self.queue, shared=True)} if self.queue else {}
