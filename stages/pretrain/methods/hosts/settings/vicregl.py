"""What a config says about `vicregl`. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from stages.models.planned import too_coarse
from stages.pretrain.config.method import MethodSettings, Start
from stages.pretrain.config.parts import Crops, check_crops
from stages.pretrain.methods.hosts.settings.two_view import MLPSettings


class VICRegLSettings(MethodSettings):
    """VICRegL: VICReg of whole views and of their matched cells.

    The paper's alpha, 0.75, is the weight of the term global; 1 - alpha is that of local.

    Source: docs/methods.md#vicregl.
    """

    builds: ClassVar[str] = "stages.pretrain.methods.hosts.vicregl:VICRegL"
    terms: ClassVar[tuple[str, ...]] = ("global", "local")
    default_weights: ClassVar[Mapping[str, float]] = {"global": 0.75, "local": 0.25}

    name: str = "vicregl"
    global_crops: Crops = Crops(size=224, count=2, scale=(0.08, 1.0))
    local_crops: Crops = Crops(size=96, count=0, scale=(0.05, 0.4))
    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    invariance: float = Field(25.0, ge=0, description="weight of squared distances")
    variance: float = Field(25.0, ge=0, description="weight of the hinge on standard deviations")
    covariance: float = Field(1.0, ge=0, description="weight of the squared covariances")
    num_matches: tuple[int, int] = Field((20, 4), description="cells kept of a pair's first and second view")
    match_order: Literal["raster", "distance"] = Field(
        "raster", description="order of the match slots: raster as the official code, distance as lightly"
    )
    projector: MLPSettings = MLPSettings(hidden=8192, out=8192, layers=3)
    local_projector: MLPSettings = MLPSettings(hidden=512, out=512, layers=3)

    @model_validator(mode="after")
    def _enough_crops(self) -> VICRegLSettings:
        check_crops(self.global_crops, self.local_crops)
        return self

    def misfits(self, start: Start) -> Iterator[tuple[str, str, str]]:
        """The term local matches cells of two views."""
        yield from super().misfits(start)
        if self.uses("local"):
            sizes = {"global_crops.size": self.global_crops.size}
            yield from too_coarse(start.backbone, sizes, 2, "the term local")

    def least_batch(self) -> int:
        """2, because variances and covariances are over the images of a batch."""
        return 2

    def over_one_pass(self) -> tuple[str, ...]:
        """Two of the three terms, of views and of cells."""
        return ("variances and covariances",)
