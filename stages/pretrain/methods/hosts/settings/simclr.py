"""What a config says about `simclr`. Free of torch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from stages.pretrain.methods.hosts.settings.two_view import MLPSettings, TwoViewSettings


class SimCLRSettings(TwoViewSettings):
    """SimCLR: two views of an image against all others of the batch.

    Source: docs/methods.md#simclr.
    """

    builds: ClassVar[str] = "stages.pretrain.methods.hosts.simclr:SimCLR"
    terms: ClassVar[tuple[str, ...]] = ("simclr",)

    name: str = "simclr"
    temperature: float = Field(0.1, gt=0, description="0.1 on ImageNet, 0.5 on small images")
    projector: MLPSettings = MLPSettings(hidden=2048, out=128)

    def over_one_pass(self) -> tuple[str, ...]:
        """The negatives."""
        return ("negatives",)
