"""What a config says about `simsiam`. Free of torch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from stages.pretrain.config.parts import Range
from stages.pretrain.methods.hosts.settings.two_view import MLPSettings, TwoViewSettings


class SimSiamSettings(TwoViewSettings):
    """SimSiam: predicts the other view's projection by the same network.

    Source: docs/methods.md#simsiam.
    """

    builds: ClassVar[str] = "stages.pretrain.methods.hosts.simsiam:SimSiam"
    terms: ClassVar[tuple[str, ...]] = ("simsiam",)

    name: str = "simsiam"
    scale: Range = Field((0.2, 1.0), description="area of a crop as a fraction of the image's")
    projector: MLPSettings = MLPSettings(hidden=2048, out=2048, layers=3)
    predictor_hidden: int = Field(512, gt=0, description="width of the predictor's hidden layer")
