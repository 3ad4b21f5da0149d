"""What a pipeline file says about a `classify_objects` stage. Nothing heavy is imported: planning reads this file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.stage import Input, StageConfig


class ClassifyObjectsConfig(StageConfig):
    """The protocol's numbers; the paper names few of them."""

    images: Input["images"] = Field(description="with object boxes and splits")
    encoder: Input["encoder"]
    train_split: str = Field("train", description="the images whose objects vote")
    test_split: str = Field("val", description="the images whose objects are classified, all of them")
    disturbed: Literal["none", "queries", "both"] = Field(
        "none",
        description="whose surroundings are replaced by another image: nobody's, those of the objects that are "
        "classified, or also those of the objects that vote",
    )
    k: int = Field(20, ge=1, description="objects that vote")
    temperature: float = Field(0.07, gt=0, description="a neighbour's vote weighs exp(cosine / temperature)")
    per_image: int | None = Field(2, ge=1, description="voting objects that an image gives at most; null: all")
    per_class: int | None = Field(
        None, ge=1, description="voting objects of a class at most; default: as many as the smallest has, 500 at most"
    )
    size: int = Field(448, gt=0, description="root of the area in pixels at which a whole image is encoded")
    pool_from: Literal["c4", "map"] = Field(
        "c4", description="c4: of a ResNet, regions of C4 pass through C5, as D3SSL trains; map: the encoder's map"
    )
    roi_size: int = Field(7, ge=1, description="cells a side that RoIAlign gives, averaged after C5")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the forward pass")
    random_baseline: bool = Field(True, description="also for a randomly initialised encoder of the same shape")
    seed: int = Field(0, ge=0, description="of the voting objects, the surroundings and the random encoder")
