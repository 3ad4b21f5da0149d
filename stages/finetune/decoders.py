"""Segmentation decoders that are trained with the encoder: linear, semantic FPN, UPerNet.

Shape legend: B images, D channels, C classes, h w sides of a map; maps come from fine to coarse.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import FeaturePyramidNetwork

from stages.finetune.levels import four_widths
from stages.models.encoder import Encoder

POOLED = (1, 2, 3, 6)  # cells a side of UPerNet's pooling pyramid (PSPNet's)


class FourMaps(nn.Module):
    """Four maps of an encoder whose strides double from one to the next.

    The stages of a ResNet, and of other CNNs and Swin, have such strides. The maps of a ViT are of one stride P: the
    first is enlarged four times by two transposed convolutions, the second twice by one, the third stays, the fourth is
    halved by max pooling, as BEiT and iBOT do.

    Args:
        encoder: whose maps these are; it is not part of this module.
        taps: where they come from, as `Encoder.levels` counts.
    """

    def __init__(self, encoder: Encoder, taps: Sequence[int] | None) -> None:
        super().__init__()
        widths = four_widths(encoder)
        self.taps = taps
        self.widths = [widths[tap - 1] for tap in taps] if taps and encoder.is_pyramid else widths
        self.scale: nn.ModuleList | None = None
        if not encoder.is_pyramid:
            width = self.widths[0]
            self.scale = nn.ModuleList(
                [
                    nn.Sequential(_enlarging(width), nn.BatchNorm2d(width), nn.GELU(), _enlarging(width)),
                    _enlarging(width),
                    nn.Identity(),
                    nn.MaxPool2d(2),
                ]
            )

    def forward(self, encoder: Encoder, images_B3HW: Tensor) -> list[Tensor]:
        """(B, D_i, h_i, w_i) each."""
        levels = encoder.levels(images_B3HW, self.taps)
        if self.scale is None:
            return levels
        return [scale(level) for scale, level in zip(self.scale, levels, strict=True)]


class SemanticFPN(nn.Module):
    """Panoptic FPN's semantic branch (Kirillov et al. 2019): every level brought to the finest, added, classified.

    Args:
        widths: D of each map.
        classes: C.
        width: channels of the branch; the pyramid has 256.
        dropout: of channels, before the last layer.
    """

    def __init__(self, widths: Sequence[int], classes: int, *, width: int, dropout: float) -> None:
        super().__init__()
        self.pyramid = FeaturePyramidNetwork(list(widths), 256)
        self.branches = nn.ModuleList(_upsampling(256, width, times) for times in range(len(widths)))
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps -> logits (B, C, h, w) at the finest map's resolution."""
        levels = list(self.pyramid({str(i): one for i, one in enumerate(maps)}).values())
        size = levels[0].shape[2:]
        total = sum(_to(branch(level), size) for branch, level in zip(self.branches, levels, strict=True))
        logits_BChw: Tensor = self.classify(self.dropout(total))
        return logits_BChw


class UPerNet(nn.Module):
    """Xiao et al. 2018: a pooling pyramid on the coarsest map, a feature pyramid, all levels fused and classified.

    Args:
        widths: D of each map.
        classes: C.
        width: channels.
        dropout: of channels, before the last layer.
    """

    def __init__(self, widths: Sequence[int], classes: int, *, width: int, dropout: float) -> None:
        super().__init__()
        self.pooled = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(cells), _convolution(widths[-1], width, 1)) for cells in POOLED
        )
        self.context = _convolution(widths[-1] + len(POOLED) * width, width, 3)
        self.lateral = nn.ModuleList(_convolution(channels, width, 1) for channels in widths[:-1])
        self.smooth = nn.ModuleList(_convolution(width, width, 3) for _ in widths[:-1])
        self.fuse = _convolution(len(widths) * width, width, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps -> logits (B, C, h, w) at the finest map's resolution."""
        last = maps[-1]
        pooled = [_to(pool(last), last.shape[2:]) for pool in self.pooled]
        top = self.context(torch.cat([last, *pooled], dim=1))
        levels = [lateral(one) for lateral, one in zip(self.lateral, maps[:-1], strict=True)]
        above = top
        for i in reversed(range(len(levels))):
            levels[i] = above = levels[i] + _to(above, levels[i].shape[2:])
        smoothed = [smooth(level) for smooth, level in zip(self.smooth, levels, strict=True)]
        size = maps[0].shape[2:]
        fused = self.fuse(torch.cat([_to(level, size) for level in (*smoothed, top)], dim=1))
        logits_BChw: Tensor = self.classify(self.dropout(fused))
        return logits_BChw


def linear_decoder(width: int, classes: int, dropout: float) -> nn.Sequential:
    """Batch norm, dropout of channels and a linear layer on every cell of the encoder's map."""
    return nn.Sequential(nn.BatchNorm2d(width), nn.Dropout2d(dropout), nn.Conv2d(width, classes, 1))


def auxiliary_head(width: int, classes: int, dropout: float) -> nn.Sequential:
    """A 3x3 convolution to 256 channels and a classifier (mmsegmentation's FCN head of one convolution)."""
    return nn.Sequential(_convolution(width, 256, 3), nn.Dropout2d(dropout), nn.Conv2d(256, classes, 1))


def _to(map_: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(map_.shape[2:]) == tuple(size):
        return map_
    return functional.interpolate(map_, size=tuple(size), mode="bilinear", align_corners=False)


def _enlarging(width: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)


def _convolution(fan_in: int, fan_out: int, side: int) -> nn.Sequential:
    convolution = nn.Conv2d(fan_in, fan_out, side, padding=side // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(fan_out), nn.ReLU(inplace=True))


def _upsampling(fan_in: int, fan_out: int, times: int) -> nn.Sequential:
    """3x3 convolutions with group norm, each followed by a doubling; one without where there is nothing to double."""
    layers: list[nn.Module] = []
    for i in range(max(1, times)):
        convolution = nn.Conv2d(fan_in if i == 0 else fan_out, fan_out, 3, padding=1, bias=False)
        layers += [convolution, nn.GroupNorm(min(32, fan_out), fan_out), nn.ReLU(inplace=True)]
        if times:
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
    return nn.Sequential(*layers)
