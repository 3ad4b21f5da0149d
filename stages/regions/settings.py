"""The settings of both region stages, apart from the stages, so that their algorithms and Ray's workers can read them.

Plain pydantic: importing this loads neither OpenCV nor torch.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.stage import Input, StageConfig


class SelectiveSearchConfig(StageConfig):
    """How boxes are searched, filtered and counted."""

    images: Input["images"]
    strategy: Literal["single", "fast", "quality"] = Field(
        "fast", description="colour spaces and groupings to combine: about 25, 170 or 800 boxes an image"
    )
    size: int | None = Field(
        320, ge=32, description="longest side to search at, in pixels; larger images are shrunk; null: as stored"
    )
    # The paper's scale 300 is the middle of the three segmentations 150, 300, 450 of `fast`; OpenCV's min_size is
    # fixed at the paper's 100 pixels.
    base_k: int = Field(150, ge=1, description="scale of the first graph segmentation")
    inc_k: int = Field(150, ge=1, description="added for each further one (fast has 3, quality 5, single 1)")
    sigma: float = Field(0.9, gt=0, description="blur before the graph segmentation, in pixels")
    min_side: float = Field(32, ge=1, description="smallest width and height of a box, in pixels of the image")
    max_aspect: float = Field(3, ge=1, description="largest ratio of the longer to the shorter side")
    min_scale: float = Field(0.3, ge=0, le=1, description="smallest sqrt(box area / image area)")
    max_scale: float = Field(0.8, gt=0, le=1, description="largest sqrt(box area / image area)")
    max_boxes: int = Field(100, ge=1, description="boxes kept an image, the best ones")

    @model_validator(mode="after")
    def _scales(self) -> SelectiveSearchConfig:
        if self.min_scale >= self.max_scale:
            raise ValueError(f"min_scale {self.min_scale} must be below max_scale {self.max_scale}")
        return self


class SuperpixelsConfig(StageConfig):
    """Which superpixels, and how large."""

    images: Input["images"]
    algorithm: Literal["slic", "slico", "mslic", "grid"] = Field(
        "slic",
        description="slic; slico adapts the compactness; mslic follows content more closely, 5 times as slow; "
        "grid: rectangles that ignore content (the ablation)",
    )
    region_size: int = Field(20, ge=2, description="mean side of a superpixel, in pixels of the image")
    compactness: float = Field(10, gt=0, description="weight of distance against colour (OpenCV's ruler)")
    iterations: int = Field(5, ge=1, description="rounds of clustering")
    min_element: int = Field(
        25,
        ge=0,
        le=100,
        description="connectivity: parts under this per cent of a mean superpixel join a neighbour",
    )
    blur_sigma: float | None = Field(4, gt=0, description="of a 3x3 Gaussian blur before; null: none")
