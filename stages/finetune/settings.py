"""What a config says about every fine-tuning stage. Free of torch, because making a plan reads it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.stage import Input, NoFingerprint
from stages.training.settings import TrainingConfig, WatchSettings

Range = tuple[float, float]  # the smaller number first


class FinetuneConfig(TrainingConfig):
    """The labelled images, the encoder to start from, and how to train it."""

    images: Input["images"] = Field(description="with labels, masks or boxes, and with splits")
    encoder: Input["encoder"] = Field(description="where training starts from; random or published: an encoder stage")
    train_split: str = Field("train", description="the images that are learnt from")
    test_split: str = Field("val", description="the images that are scored at the end")
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="learning rate of a layer over that of the layer above it; the head has the whole rate",
    )
    batch_norm: Literal["train", "freeze"] = Field(
        "train", description="the encoder's batch norms: trained, over all ranks, or left as they are"
    )
    flip: float = Field(0.5, ge=0, le=1, description="probability that a training image is mirrored")
    colour_jitter: float = Field(
        0.0, ge=0, lt=1, description="largest change of brightness, contrast and saturation, as a share"
    )
    # Supervised features may be of few directions; what the pre-training's limit is for cannot happen here.
    watch: Annotated[WatchSettings, NoFingerprint] = WatchSettings(min_rank=0)
