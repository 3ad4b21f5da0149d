"""What a config says about a backbone. Imports no torch, because planning reads this file.

`encoder.py` turns a `Backbone` into an `Encoder`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.stage import Settings, Source

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Backbone(Settings):
    """A ViT or ResNet by its timm name: random, from timm's weights, or from a checkpoint file."""

    name: str = Field(description="timm model name, e.g. vit_small_patch16_224, resnet50")
    pretrained: bool = Field(False, description="download timm's weights for that name; never happens otherwise")
    checkpoint: Source | None = Field(None, description="weights file: .safetensors, or a .pth read with weights_only")
    img_size: int | None = Field(None, gt=0, description="side of the position table's images (ViT); default: timm's")
    patch_size: int | None = Field(None, gt=0, description="patch side in pixels (ViT); default: by the name")
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth of the student, 0 -> this over the blocks")
    class_token: bool = Field(True, description="false: a ViT without [CLS] (FLSL); the vector is then the token mean")
    pos_embed: Literal["learned", "sincos"] = Field("learned", description="sincos: fixed 2-D table (FLSL, MAE)")
    pos_interp: Literal["size", "scale_factor_plus_0.1"] = Field(
        "size",
        description="position table at other sizes: size = timm's own, so that timm alone gives the same features at "
        "every size; scale_factor_plus_0.1 = the DINO family's, to reproduce DINO and FLSL numbers",
    )
    out_stage: Literal["c4", "c5"] = Field("c5", description="ResNet: which stage the feature map comes from")
    output_stride: Literal[8, 16, 32] = Field(32, description="ResNet: below 32 the last stages are dilated instead")
    mean: tuple[float, float, float] | None = Field(None, description="normalisation; default: ImageNet's, or timm's")
    std: tuple[float, float, float] | None = Field(None, description="normalisation; default: ImageNet's, or timm's")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="further arguments of timm.create_model")

    @model_validator(mode="after")
    def _one_origin(self) -> Backbone:
        if self.pretrained and self.checkpoint is not None:
            raise ValueError("pretrained and checkpoint are both set: the weights come from one place; remove one")
        ours = {"pretrained", "num_classes", "img_size", "patch_size", "class_token", "drop_path_rate", "output_stride"}
        twice = sorted(ours & set(self.kwargs))
        if twice:
            raise ValueError(f"kwargs: {', '.join(twice)} may not be set here: use the backbone's own field")
        return self

    def untrained(self) -> Backbone:
        """The same shape without any weights to load."""
        return self.model_copy(update={"pretrained": False, "checkpoint": None})

    def anywhere(self) -> Backbone:
        """The same with an absolute checkpoint path, for workers, whose working folder is not the driver's."""
        if self.checkpoint is None or "://" in self.checkpoint:
            return self
        return self.model_copy(update={"checkpoint": str(Path(self.checkpoint).absolute())})
