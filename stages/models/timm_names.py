"""A config's `Backbone` as arguments of timm.create_model, with the rules that timm does not check itself."""

from __future__ import annotations

from typing import Any

import timm
from timm.models import is_model_in_modules

from pipeline.errors import UsageError
from stages.models.settings import Backbone


def timm_kwargs(backbone: Backbone) -> dict[str, Any]:
    """Arguments of timm.create_model, as a user of timm alone would write them.

    Raises: UsageError for a name that timm does not have, or a setting that does not fit the model.
    """
    name = backbone.name
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:8]
        hint = f"for example {', '.join(close)}" if close else "see timm.list_models()"
        raise UsageError(f"backbone.name: timm has no model called {name!r}: use one of its names, {hint}")
    kwargs: dict[str, Any] = {"num_classes": 0, **backbone.kwargs}
    if is_model_in_modules(name, ["vision_transformer", "deit"]):
        kwargs |= {"dynamic_img_size": True, "img_size": backbone.img_size, "patch_size": backbone.patch_size}
        # fc_norm=False keeps the final norm on the tokens whatever the pooling, so that the map is normalised.
        kwargs["fc_norm"] = False
        if not backbone.class_token:
            kwargs |= {"class_token": False, "global_pool": "avg"}
        if backbone.out_stage != "c5" or backbone.output_stride != 32:
            raise UsageError(
                f"backbone.out_stage, backbone.output_stride: {name} is a ViT; remove them, they are a ResNet's"
            )
        return {key: value for key, value in kwargs.items() if value is not None}
    if (
        backbone.pos_embed == "sincos"
        or not backbone.class_token
        or backbone.pos_interp != "size"
        or backbone.patch_size
    ):
        raise UsageError(
            f"backbone.pos_embed, class_token, pos_interp, patch_size: {name} is not a plain ViT; "
            "remove them or name a ViT"
        )
    if is_model_in_modules(name, ["resnet"]):
        return kwargs if backbone.output_stride == 32 else {**kwargs, "output_stride": backbone.output_stride}
    if backbone.out_stage != "c5" or backbone.output_stride != 32:
        raise UsageError(f"backbone.out_stage, backbone.output_stride: {name} is not a ResNet; remove them")
    if is_model_in_modules(name, ["eva"]):
        kwargs |= {"dynamic_img_size": True}
    return kwargs if backbone.img_size is None else {**kwargs, "img_size": backbone.img_size}
