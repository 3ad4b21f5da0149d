"""What a config says about the `label_efficiency` stage. Free of torch, because making a plan reads it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from pipeline.stage import Input, Settings, StageConfig
from stages.evaluate.frozen import Positives


class Candidate(Settings):
    """One encoder."""

    name: str = Field(pattern=r"^[\w.-]+$", description="what the curve is called")
    features: Input["features"] = Field(description="of the images, by this encoder")


class LabelEfficiencyConfig(StageConfig):
    """Which encoders, on how many of the labels."""

    images: Input["images"] = Field(description="with labels or masks in both splits")
    encoders: list[Candidate] = Field(
        min_length=2, description="the first is judged against each of the others: its start, random weights"
    )
    task: Literal["classification", "segmentation"] = Field(
        "classification", description="classification: the images' labels, top1; segmentation: their masks, miou"
    )
    fractions: list[float] = Field(
        [0.01, 0.05, 0.1, 1.0], description="of the labelled train images; of each class at least one image"
    )
    draws: int = Field(3, ge=1, description="of the images that keep their labels, the same for every encoder")
    train_split: str = Field("train", description="the images that are learnt from")
    test_split: str = Field("val", description="the images that are scored")
    c: Positives = Field(
        [1e-3, 1e-1, 10.0],
        description="inverse strength of the logistic regression's L2 penalty; of several, the best by three-fold "
        "cross-validation on the images that keep their labels",
    )
    patches: int = Field(100, ge=1, description="segmentation: patches of a train image that are learnt from")
    resamples: int = Field(1000, ge=100, description="bootstrap samples of test images and draws")
    seed: int = Field(0, ge=0, description="of everything drawn at random")

    @field_validator("encoders")
    @classmethod
    def _named_apart(cls, encoders: list[Candidate]) -> list[Candidate]:
        names = [one.name for one in encoders]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the name {twice[0]} is there twice: give every encoder its own")
        return encoders

    @field_validator("fractions")
    @classmethod
    def _rising(cls, fractions: list[float]) -> list[float]:
        if not fractions or min(fractions) <= 0 or max(fractions) > 1:
            raise ValueError(f"{fractions}: give numbers above 0 and up to 1")
        return sorted(set(fractions))
