"""What a config says about `vicreg`. Free of torch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from stages.pretrain.methods.hosts.settings.two_view import MLPSettings, TwoViewSettings


class VICRegSettings(TwoViewSettings):
    """VICReg: invariance between views, variance and covariance within them.

    Source: docs/methods.md#vicreg.
    """

    builds: ClassVar[str] = "stages.pretrain.methods.hosts.vicreg:VICReg"
    terms: ClassVar[tuple[str, ...]] = ("vicreg",)

    name: str = "vicreg"
    invariance: float = Field(25.0, ge=0, description="weight of the views' squared distance")
    variance: float = Field(25.0, ge=0, description="weight of the hinge on standard deviations")
    covariance: float = Field(1.0, ge=0, description="weight of the squared covariances")
    projector: MLPSettings = MLPSettings(hidden=8192, out=8192, layers=3)

    def over_one_pass(self) -> tuple[str, ...]:
        """Two of the three terms."""
        return ("variances and covariances",)
