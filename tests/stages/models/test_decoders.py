"""Decoders on ResNet and ViT levels: shapes, gradients, and the pyramid against its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional

from stages.models.decoders import FPN, DeepLabV3Plus, build_decoder
from stages.models.encoder import Encoder
from stages.models.settings import Backbone
from tests.stages.pretrain.methods.tiny import tiny_encoder


@pytest.mark.parametrize("name", ["fpn", "deeplab"])
@pytest.mark.parametrize("resnet", [False, True])
def test_output_is_as_fine_as_the_first_level(name: str, resnet: bool) -> None:
    encoder = tiny_encoder(resnet=resnet)
    decoder = build_decoder(name, encoder, 20)  # type: ignore[arg-type]
    levels = encoder.levels(torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(0)))
    assert [level.shape[1] for level in levels] == encoder.level_widths
    out = decoder(levels)
    assert out.shape == (2, 20, 16, 12)  # the ViT's patch and the ResNet's first stage are both 4 pixels
    out.square().sum().backward()
    silent = [key for key, p in decoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_fpn_adds_levels_up_from_the_coarsest() -> None:
    torch.manual_seed(0)
    decoder = FPN([3, 5], 4)
    fine, coarse = torch.randn(1, 3, 8, 8), torch.randn(1, 5, 4, 4)
    up = functional.interpolate(decoder.lateral[1](coarse), size=(8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(decoder([fine, coarse]), decoder.lateral[0](fine) + up)


def test_deeplab_is_what_its_recipe_says() -> None:
    widths = [int(stage["num_chs"]) for stage in Encoder.build(Backbone(name="resnet18")).model.feature_info[1:5]]
    assert widths == [64, 128, 256, 512]
    decoder = DeepLabV3Plus(widths, 128)
    convolutions = [module for module in decoder.modules() if isinstance(module, torch.nn.Conv2d)]
    dilated = [c for c in convolutions if c.kernel_size == (3, 3) and c.groups == c.in_channels]
    assert [c.dilation[0] for c in dilated] == [12, 24, 36, 1, 1]
    assert [c.in_channels for c in dilated] == [512, 512, 512, 304, 256]
    assert [(c.in_channels, c.out_channels) for c in convolutions if c.groups == 1 and c.kernel_size == (3, 3)] == [
        (1280, 256)
    ]
    assert sum(isinstance(module, torch.nn.AdaptiveAvgPool2d) for module in decoder.modules()) == 1
