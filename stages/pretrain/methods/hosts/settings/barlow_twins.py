"""What a config says about `barlow_twins`. Free of torch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from stages.pretrain.methods.hosts.settings.two_view import MLPSettings, TwoViewSettings


class BarlowTwinsSettings(TwoViewSettings):
    """Barlow Twins. Projections are centred as in the official code, which the paper's Eq. 5 leaves out.

    Source: docs/methods.md#barlow-twins.
    """

    builds: ClassVar[str] = "stages.pretrain.methods.hosts.barlow_twins:BarlowTwins"
    terms: ClassVar[tuple[str, ...]] = ("barlow_twins",)

    name: str = "barlow_twins"
    off_diagonal: float = Field(0.005, ge=0, description="weight of the off-diagonal entries")
    projector: MLPSettings = MLPSettings(hidden=8192, out=8192, layers=3)

    def over_one_pass(self) -> tuple[str, ...]:
        """The whole loss."""
        return ("the cross-correlation",)
