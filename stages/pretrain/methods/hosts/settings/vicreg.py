"""What a config says about `vicreg`: invariance, variance, covariance. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from stages.pretrain.methods.hosts.settings.two_view import MLPSettings, TwoViewSettings, at_least_two

if TYPE_CHECKING:
    from stages.models.encoder import Encoder
    from stages.pretrain.methods.method import Method


class VICRegSettings(TwoViewSettings):
    """VICReg (methods.md 2.7)."""

    terms: ClassVar[tuple[str, ...]] = ("vicreg",)

    name: str = "vicreg"
    invariance: float = Field(25.0, ge=0, description="weight of the views' squared distance")
    variance: float = Field(25.0, ge=0, description="weight of the hinge on standard deviations")
    covariance: float = Field(1.0, ge=0, description="weight of the squared covariances")
    projector: MLPSettings = MLPSettings(hidden=8192, out=8192, layers=3)

    def build(self, encoder: Encoder, *, total_steps: int, steps_per_epoch: int, global_batch: int) -> Method:
        from stages.pretrain.methods.hosts.vicreg import VICReg

        at_least_two(global_batch, self.name)
        return VICReg(self, encoder)
