"""Decoders: an encoder's maps at several depths -> one map of embeddings.

A method trains through a decoder; it is not part of the encoder that the method gives.

Shape legend: B images, D width of the embeddings, h w sides of the finest level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPPPooling

from stages.models.encoder import Encoder


def build_decoder(name: Literal["fpn", "deeplab"], encoder: Encoder, width: int) -> nn.Module:
    """A decoder for `encoder.levels(image)`; its map has `width` channels and the resolution of the first level."""
    return (FPN if name == "fpn" else DeepLabV3Plus)(encoder.level_widths, width)


class FPN(nn.Module):
    """PiCIE's decoder: levels projected to D by 1x1 convolutions and added, from the coarsest to the finest."""

    def __init__(self, widths: Sequence[int], width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in widths)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Maps from fine to coarse -> (B, D, h, w)."""
        *finer, total = [project(level) for project, level in zip(self.lateral, levels, strict=True)]
        for lateral in reversed(finer):
            total = lateral + _enlarge(total, lateral)
        return total


class DeepLabV3Plus(nn.Module):
    """Atrous pyramid on the last level, refined with the first (Chen et al. 2018, as ViCE configures it).

    Dilations 1, 12, 24, 36 with separable convolutions, image pooling, 256 channels fused by a 3x3 convolution; 48
    channels of the first level join; two separable convolutions; 1x1 to D.
    """

    def __init__(self, widths: Sequence[int], width: int, *, channels: int = 256, low_level: int = 48) -> None:
        super().__init__()
        deep = widths[-1]
        self.branches = nn.ModuleList(
            [_convolution(deep, channels, 1)]
            + [_separable(deep, channels, dilation) for dilation in (12, 24, 36)]
            + [ASPPPooling(deep, channels)]
        )
        self.fuse = _convolution(5 * channels, channels, 3)
        self.low_level = _convolution(widths[0], low_level, 1)
        self.refine = nn.Sequential(_separable(channels + low_level, channels), _separable(channels, channels))
        self.project = nn.Conv2d(channels, width, 1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Maps from fine to coarse -> (B, D, h, w)."""
        pyramid = self.fuse(torch.cat([branch(levels[-1]) for branch in self.branches], dim=1))
        fine = self.low_level(levels[0])
        embeddings_BDhw: Tensor = self.project(self.refine(torch.cat([_enlarge(pyramid, fine), fine], dim=1)))
        return embeddings_BDhw


def _enlarge(map_: Tensor, like: Tensor) -> Tensor:
    return functional.interpolate(map_, size=like.shape[2:], mode="bilinear", align_corners=False)


def _convolution(fan_in: int, fan_out: int, side: int, *, dilation: int = 1, groups: int = 1) -> nn.Sequential:
    padding = dilation * (side // 2)
    convolution = nn.Conv2d(fan_in, fan_out, side, padding=padding, dilation=dilation, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(fan_out), nn.ReLU(inplace=True))


def _separable(fan_in: int, fan_out: int, dilation: int = 1) -> nn.Sequential:
    """A 3x3 convolution of each channel on its own, then a 1x1 over channels; norm and ReLU after both."""
    depthwise = _convolution(fan_in, fan_in, 3, dilation=dilation, groups=fan_in)
    return nn.Sequential(depthwise, _convolution(fan_in, fan_out, 1))
