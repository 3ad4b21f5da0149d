"""What a config says about `simsiam`: predict the other view's own projection. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from stages.pretrain.methods.hosts.settings.two_view import MLPSettings, TwoViewSettings, at_least_two

if TYPE_CHECKING:
    from stages.models.encoder import Encoder
    from stages.pretrain.methods.method import Method


class SimSiamSettings(TwoViewSettings):
    """SimSiam (methods.md 2.7)."""

    terms: ClassVar[tuple[str, ...]] = ("simsiam",)

    name: str = "simsiam"
    scale: tuple[float, float] = Field((0.2, 1.0), description="area of a crop as a fraction of the image's")
    projector: MLPSettings = MLPSettings(hidden=2048, out=2048, layers=3)
    predictor_hidden: int = Field(512, gt=0)

    def build(self, encoder: Encoder, *, total_steps: int, steps_per_epoch: int, global_batch: int) -> Method:
        from stages.pretrain.methods.hosts.simsiam import SimSiam

        at_least_two(global_batch, self.name)
        return SimSiam(self, encoder)
