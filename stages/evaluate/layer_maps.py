"""The maps of a frozen encoder at every layer, by name.

Shape legend: B images, H W their sides, D width of a layer, h w its map.
"""

from __future__ import annotations

from torch import Tensor

from stages.models.encoder import Encoder


def layer_maps(encoder: Encoder, images_B3HW: Tensor) -> dict[str, Tensor]:
    """From the first layer to the last, (B, D, h, w) each.

    A ResNet's layers are its stem (c1, after the pooling) and its four stages (c2 to c5), a ViT's all its blocks. Of
    other backbones, and of encoders with a filter, the last one is the map that evaluations see (map).
    """
    model = encoder.model
    maps: dict[str, Tensor] = {}
    if encoder.is_resnet:
        maps["c1"] = model.maxpool(model.act1(model.bn1(model.conv1(images_B3HW))))
        maps |= {f"c{i}": map_BDhw for i, map_BDhw in enumerate(encoder.levels(images_B3HW, (1, 2, 3, 4)), 2)}
    elif encoder.is_vit:
        blocks = list(range(len(model.blocks)))
        levels = encoder.levels(images_B3HW, blocks)
        maps = {f"block_{i}": map_BDhw for i, map_BDhw in zip(blocks, levels, strict=True)}
    if not maps or encoder.filter is not None:
        maps["map"] = encoder(images_B3HW).map
    return maps
