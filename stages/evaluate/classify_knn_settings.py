"""What a pipeline file says about a `classify_knn` stage. Nothing heavy is imported: planning reads this file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.stage import Input, StageConfig


class ClassifyKnnConfig(StageConfig):
    """The protocol's numbers; defaults are DINO's."""

    images: Input["images"] = Field(description="with labels and splits")
    encoder: Input["encoder"]
    train_split: str = Field("train", description="the images that vote")
    test_split: str = Field("val", description="the images that are classified")
    k: int = Field(20, ge=1, description="neighbours that vote")
    temperature: float = Field(0.07, gt=0, description="a neighbour's vote weighs exp(cosine / temperature)")
    pooling: Literal["cls", "mean"] = Field("cls", description="[CLS] (token mean where there is none), or map mean")
    resize: int = Field(256, gt=0, description="short side in pixels before the crop")
    crop: int = Field(224, gt=0, description="side in pixels of the central square that is encoded")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the forward pass")
    random_baseline: bool = Field(True, description="also for a randomly initialised encoder of the same shape")
    seed: int = Field(0, description="of the random encoder")

    @model_validator(mode="after")
    def _crop_fits(self) -> ClassifyKnnConfig:
        if self.crop > self.resize:
            raise ValueError(f"crop {self.crop} is larger than resize {self.resize}; lower crop or raise resize")
        return self
