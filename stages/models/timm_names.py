"""A config's `Backbone` as arguments of timm.create_model. Which options fit which model, `Backbone` has checked."""

from __future__ import annotations

from typing import Any

import timm
from timm.models import is_model_in_modules

from pipeline.errors import UsageError
from stages.models.settings import Backbone

# Files of timm whose models take images of many sizes only if they are told to; plain ViTs aside.
_OF_ANY_SIZE = [
    "eva",
    "swin_transformer",
    "swin_transformer_v2",
    "swin_transformer_v2_cr",
    "vision_transformer_hybrid",
    "vitamin",
]


def timm_kwargs(backbone: Backbone) -> dict[str, Any]:
    """Arguments of timm.create_model, as a user of timm alone would write them.

    Raises: UsageError for a name that timm does not have.
    """
    name = backbone.name
    if not timm.is_model(name):
        raise UsageError(f"backbone.name: timm has no model called {name!r}: use a name of timm.list_models()")
    kwargs: dict[str, Any] = {"num_classes": 0, **backbone.kwargs}
    if is_model_in_modules(name, ["vision_transformer", "deit"]):
        kwargs |= {"dynamic_img_size": True, "img_size": backbone.img_size, "patch_size": backbone.patch_size}
        # fc_norm=False keeps the final norm on the tokens whatever the pooling, so that the map is normalised.
        kwargs["fc_norm"] = False
        if not backbone.class_token:
            kwargs |= {"class_token": False, "global_pool": "avg"}
        return {key: value for key, value in kwargs.items() if value is not None}
    if backbone.output_stride != 32:
        kwargs |= {"output_stride": backbone.output_stride}
    if is_model_in_modules(name, ["resnet"]):
        return kwargs
    if is_model_in_modules(name, _OF_ANY_SIZE):
        kwargs |= {"dynamic_img_size": True}
    return kwargs if backbone.img_size is None else {**kwargs, "img_size": backbone.img_size}
