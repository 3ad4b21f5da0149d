"""What a config says about `simclr`: two views of an image against all others. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from stages.pretrain.methods.hosts.settings.two_view import MLPSettings, TwoViewSettings, at_least_two

if TYPE_CHECKING:
    from stages.models.encoder import Encoder
    from stages.pretrain.methods.method import Method


class SimCLRSettings(TwoViewSettings):
    """SimCLR (methods.md 2.7)."""

    terms: ClassVar[tuple[str, ...]] = ("simclr",)

    name: str = "simclr"
    temperature: float = Field(0.1, gt=0, description="0.1 on ImageNet, 0.5 on small images")
    projector: MLPSettings = MLPSettings(hidden=2048, out=128)

    def build(self, encoder: Encoder, *, total_steps: int, steps_per_epoch: int, global_batch: int) -> Method:
        from stages.pretrain.methods.hosts.simclr import SimCLR

        at_least_two(global_batch, self.name)
        return SimCLR(self, encoder)
