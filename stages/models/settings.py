"""What a config says about a backbone. Imports no torch, because planning reads this file.

`encoder.py` turns a `Backbone` into an `Encoder`.
"""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.stage import Settings, Source, local_path
from stages.models import timm_catalogue

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _unset(value: object) -> bool:
    return value is None


class Backbone(Settings):
    """A timm model by its name: random, from timm's weights, or from a checkpoint file."""

    name: str = Field(description="timm model name, e.g. vit_small_patch16_224, resnet50")
    pretrained: bool = Field(False, description="download timm's weights for that name; never happens otherwise")
    checkpoint: Source | None = Field(None, description="weights file: .safetensors, or a .pth read with weights_only")
    img_size: int | None = Field(
        None, gt=0, description="side of the images that a position table or windows are made for; default: timm's"
    )
    patch_size: int | None = Field(None, gt=0, description="patch side in pixels (ViT); default: by the name")
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth of the student, 0 -> this over the blocks")
    class_token: bool = Field(True, description="false: a ViT without [CLS] (FLSL); the vector is then the token mean")
    pos_embed: Literal["learned", "sincos"] = Field("learned", description="sincos: fixed 2-D table (FLSL, MAE)")
    pos_interp: Literal["size", "scale_factor_plus_0.1"] = Field(
        "size",
        description="position table at other sizes: size = timm's own, so that timm alone gives the same features at "
        "every size; scale_factor_plus_0.1 = the DINO family's, to reproduce DINO and FLSL numbers",
    )
    stride: int | None = Field(
        None,
        gt=0,
        exclude_if=_unset,
        description="pixels that a cell of the map stands for: the map is the model's last level of this stride; "
        "default: its last level",
    )
    out_stage: Literal["c4", "c5"] = Field("c5", description="ResNet: which stage the feature map comes from")
    output_stride: Literal[8, 16, 32] = Field(
        32, description="ResNet and other CNNs: below 32 the last stages are dilated instead of strided"
    )
    mean: tuple[float, float, float] | None = Field(None, description="normalisation; default: ImageNet's, or timm's")
    std: tuple[float, float, float] | None = Field(None, description="normalisation; default: ImageNet's, or timm's")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="further arguments of timm.create_model")

    @field_validator("name")
    @classmethod
    def _timm_has_it(cls, name: str) -> str:
        known = timm_catalogue.names()  # empty where timm's files cannot be read: then timm itself will say
        if known and timm_catalogue.look_up(name) is None:
            close = difflib.get_close_matches(name.split(".")[0], known, n=3, cutoff=0.6)
            hint = (
                f"did you mean {' or '.join(close)}?" if close else "python -c 'import timm; print(timm.list_models())'"
            )
            raise ValueError(f"timm has no model called {name!r}; {hint}")
        tags = timm_catalogue.tags(name)
        if tags and "." in name and name.partition(".")[2] not in tags:
            raise ValueError(f"timm has no weights called {name!r}; after the dot may stand {', '.join(tags)}")
        return name

    @model_validator(mode="after")
    def _options_fit(self) -> Backbone:
        model = timm_catalogue.look_up(self.name)
        if model is None:
            return self
        if not model.has_single_map:
            raise ValueError(f"name: {self.name} gives several streams and no single feature map; name another model")
        of_resnets = self._changed("out_stage", "output_stride")
        of_vits = self._changed("pos_embed", "class_token", "pos_interp", "patch_size")
        if model.is_vit and of_resnets:
            raise ValueError(f"{', '.join(of_resnets)}: {self.name} is a ViT; remove them, they are a ResNet's")
        if not model.is_vit and of_vits:
            raise ValueError(f"{', '.join(of_vits)}: {self.name} is not a plain ViT; remove them or name a ViT")
        if not model.is_resnet and self._changed("out_stage"):
            raise ValueError(
                f"out_stage: {self.name} is not a ResNet; remove it, `stride` chooses the map of any model"
            )
        if model.dilates is False and self._changed("output_stride"):
            raise ValueError(
                f"output_stride: timm does not dilate the stages of {self.name}; remove it, and choose a finer level "
                f"with `stride`, one of {_listed(model.strides)}"
            )
        if self.patch and self.img_size and self.img_size % self.patch:
            raise ValueError(
                f"img_size: {self.img_size} pixels do not split into patches of {self.patch}; "
                f"set it to {near_multiples(self.img_size, self.patch)}"
            )
        self._require_level()
        return self

    def _require_level(self) -> None:
        if self.stride is None:
            return
        if self._changed("out_stage"):
            raise ValueError("stride, out_stage: both choose the level that the map comes from; remove one")
        strides = self.strides
        if strides is not None and self.stride not in strides:
            if len(strides) > 1:
                what, remedy = f"the levels of {self.name} have strides {_listed(strides)}", "name one of them"
            else:
                what = f"{self.name} has one level, of patches of {strides[0]} pixels"
                remedy = f"remove it or set patch_size: {self.stride}" if self.is_vit else "remove it"
            raise ValueError(f"stride: {what}, none of {self.stride}; {remedy}")

    def _changed(self, *fields: str) -> list[str]:
        return [name for name in fields if getattr(self, name) != type(self).model_fields[name].default]

    @model_validator(mode="after")
    def _one_origin(self) -> Backbone:
        if self.pretrained and self.checkpoint is not None:
            raise ValueError("pretrained and checkpoint are both set: the weights come from one place; remove one")
        ours = {"pretrained", "num_classes", "img_size", "patch_size", "class_token", "drop_path_rate", "output_stride"}
        twice = sorted(ours & set(self.kwargs))
        if twice:
            raise ValueError(f"kwargs: {', '.join(twice)} may not be set here: use the backbone's own field")
        return self

    @property
    def is_vit(self) -> bool | None:
        """Whether it is a plain ViT, as far as the name says; None where it does not."""
        model = timm_catalogue.look_up(self.name)
        return model.is_vit if model is not None else None

    @property
    def is_resnet(self) -> bool:
        """Whether it is a ResNet, as far as the name says."""
        model = timm_catalogue.look_up(self.name)
        return model is not None and model.is_resnet

    @property
    def patch(self) -> int | None:
        """Side of a plain ViT's patch in pixels; None for other models."""
        model = timm_catalogue.look_up(self.name)
        return (self.patch_size or model.patch) if model is not None and model.is_vit else None

    @property
    def strides(self) -> tuple[int, ...] | None:
        """Pixels that a cell stands for, of each level from the finest; None where only the built model will tell."""
        model = timm_catalogue.look_up(self.name)
        if self.patch is not None:
            return (self.patch,)
        if model is None or model.strides is None:
            return None
        return tuple(min(stride, self.output_stride) if model.dilates else stride for stride in model.strides)

    @property
    def cell(self) -> int | None:
        """Pixels that a cell of the map stands for; None where only the built model will tell."""
        if self.stride is not None or self.strides is None:
            return self.stride
        return self.strides[-2 if self.out_stage == "c4" else -1]

    @property
    def only_size(self) -> int | None:
        """The side of the only images that it takes, as far as is known."""
        model = timm_catalogue.look_up(self.name)
        return self.img_size or model.own_size if model is not None and model.own_size else None

    @property
    def size_step(self) -> int | None:
        """What sides of its images are multiples of because of its windows, as far as is known."""
        model = timm_catalogue.look_up(self.name)
        return self.img_size or model.window_side if model is not None and model.window_side else None

    def refuses(self, size: int) -> tuple[str, str] | None:
        """Why it takes no images of `size` pixels a side, and which it takes; None where it does, or may.

        Models whose sizes only timm knows are asked when they are built (`Encoder.require_size`).
        """
        model = timm_catalogue.look_up(self.name)
        divisor = self.patch or (model.divisor if model is not None else None)
        if divisor and size % divisor:
            return f"{size} pixels do not split into patches of {divisor}", f"set it to {near_multiples(size, divisor)}"
        step = self.size_step
        if step and size % step:
            what = f"{self.name} takes images of multiples of {step} pixels only, not of {size}"
            return what, f"set it to {near_multiples(size, step)}, or backbone.img_size to {size}"
        if model is not None and not model.pads and self.strides and size < self.strides[-1]:
            what = f"{self.name} takes images of at least {self.strides[-1]} pixels, not of {size}"
            return what, f"set it to {self.strides[-1]} or more"
        only = self.only_size
        if only and size != only:
            what = f"{self.name} takes images of {only} pixels only, not of {size}"
            return what, f"set it to {only}, or backbone.img_size to {size}"
        return None

    def untrained(self) -> Backbone:
        """The same shape without any weights to load."""
        return self.model_copy(update={"pretrained": False, "checkpoint": None})

    def anywhere(self) -> Backbone:
        """The same with an absolute checkpoint path, for workers, whose working folder is not the driver's."""
        if self.checkpoint is None or "://" in self.checkpoint:
            return self
        return self.model_copy(update={"checkpoint": str(local_path(self.checkpoint).absolute())})


def _listed(strides: tuple[int, ...] | None) -> str:
    return ", ".join(map(str, dict.fromkeys(strides or ())))


def near_multiples(pixels: int, patch: int) -> str:
    """The sizes next to `pixels` that split into patches, in words: "96 or 112"."""
    below = pixels // patch * patch
    return " or ".join(str(side) for side in (below, below + patch) if side)
