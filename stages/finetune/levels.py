"""The four maps of an encoder that decoders and necks read: whether their strides differ, and their widths."""

from __future__ import annotations

from pipeline.errors import UsageError
from stages.models.encoder import Encoder


def is_pyramid(encoder: Encoder) -> bool:
    """Whether the strides of its maps double from one to the next, as a ResNet's do; a ViT's are all the same."""
    return encoder.is_resnet


def level_widths(encoder: Encoder) -> list[int]:
    """Channels of the maps of `Encoder.levels`, from fine to coarse.

    Raises:
        UsageError: for a backbone that gives other maps.
    """
    if encoder.is_resnet:
        return [int(stage["num_chs"]) for stage in encoder.model.feature_info[1:5]]
    if encoder.is_vit:
        return [int(encoder.model.num_features)] * 4
    raise UsageError(
        f"backbone {encoder.backbone.name}: four maps exist for ViTs and ResNets only (choose one of those, or a "
        "decoder that reads the encoder's own map)"
    )
