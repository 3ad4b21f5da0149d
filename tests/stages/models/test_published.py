"""Files in the layouts of DINO, iBOT, DINOv2 and MoCo, made from a timm model's own weights: its features come back."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import SourceError
from stages.models.encoder import Encoder
from stages.models.settings import Backbone

Weights = dict[str, Tensor]

TINY = {"embed_dim": 48, "depth": 4, "num_heads": 3}
VIT = Backbone(name="vit_tiny_patch16_224", img_size=64, kwargs=TINY)
RESNET = Backbone(name="test_resnet")
DINOV2 = Backbone(name="vit_small_patch14_dinov2", img_size=56, kwargs=TINY)
REGISTERS = DINOV2.model_copy(update={"name": "vit_small_patch14_reg4_dinov2"})
GIANT = DINOV2.model_copy(update={"name": "vit_giant_patch14_dinov2"})
DINOV3 = Backbone(name="vit_small_patch16_dinov3", img_size=64, kwargs=TINY)


def under(prefix: str, weights: Weights) -> Weights:
    return {prefix + key: value for key, value in weights.items()}


def like(weights: Weights) -> Weights:
    """Another network of the same shape, whose weights must not be taken."""
    return {key: torch.randn_like(value) if value.is_floating_point() else value for key, value in weights.items()}


def heads(prefix: str = "head.") -> Weights:
    return {f"{prefix}{key}": torch.zeros(3, 3) for key in ("mlp.0.weight", "last_layer.weight_g")}


def dino(weights: Weights) -> Any:
    """main_dino.py's checkpoint.pth, with its arguments."""
    return {
        "student": under("module.backbone.", like(weights)) | heads("module.head."),
        "teacher": under("backbone.", weights) | heads(),
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", out_dim=65536),
        "dino_loss": {"center": torch.zeros(1, 3)},
    }


def ibot(weights: Weights) -> Any:
    """iBOT's checkpoint_teacher.pth."""
    return {"state_dict": weights | {"masked_embed": torch.zeros(1, 48)}}


def moco_v3(weights: Weights) -> Any:
    """MoCo v3's vit-*-300ep.pth.tar: the projector is the encoder's head."""
    networks = under("module.base_encoder.", weights) | under("module.momentum_encoder.", like(weights))
    projectors = {"module.base_encoder.head.0.weight": torch.zeros(3, 3), "module.predictor.0.weight": torch.zeros(3)}
    return {"epoch": 300, "arch": "vit_small", "state_dict": networks | projectors, "optimizer": {"state": {}}}


def moco_v2(weights: Weights) -> Any:
    networks = under("module.encoder_q.", weights) | under("module.encoder_k.", like(weights))
    return {
        "state_dict": {**networks, "module.encoder_q.fc.0.weight": torch.zeros(3, 3), "module.queue": torch.zeros(3)}
    }


def dinov2(weights: Weights) -> Weights:
    """dinov2_vit*14_pretrain.pth."""
    return weights | {"mask_token": torch.zeros(1, 48)}


def dinov2_registers(weights: Weights) -> Weights:
    """dinov2_vit*14_reg4_pretrain.pth: the table has a row for [CLS], which timm has added to the token itself."""
    renamed = dinov2(weights)
    renamed["register_tokens"] = renamed.pop("reg_token")
    row = torch.randn(1, 1, 48)
    renamed["pos_embed"] = torch.cat([row, renamed["pos_embed"]], dim=1)
    renamed["cls_token"] = renamed["cls_token"] - row
    return renamed


def dinov2_giant(weights: Weights) -> Weights:
    """Its gated MLP has layers w12 and w3."""
    return dinov2(
        {key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): value for key, value in weights.items()}
    )


def dinov2_training(weights: Weights) -> Any:
    """DINOv2's teacher_checkpoint.pth, with two blocks a chunk."""
    chunked = {}
    for key, value in dinov2_registers(weights).items():
        parts = key.split(".")
        if parts[0] == "blocks":
            parts.insert(1, str(int(parts[1]) // 2))
        chunked[".".join(parts)] = value
    return {"teacher": under("backbone.", chunked) | {"dino_head.mlp.0.weight": torch.zeros(3, 3)}}


def dinov3(weights: Weights) -> Weights:
    """dinov3_vits16_pretrain_*.pth: keys of queries, keys and values have a bias of zeros, which timm does without."""
    names = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma", "reg_token": "storage_tokens"}
    renamed = {}
    for key, value in weights.items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        renamed[key] = value
    biases = {f"blocks.{i}.attn.qkv.{name}": torch.zeros(3 * 48) for i in range(4) for name in ("bias", "bias_mask")}
    return renamed | biases | {"mask_token": torch.zeros(1, 48), "rope_embed.periods": torch.ones(4)}


LAYOUTS: dict[str, tuple[Backbone, Callable[[Weights], Any], str | None]] = {
    "dino_backbone": (VIT, dict, None),
    "dino_full": (VIT, dino, "DINO"),
    "dino_resnet": (RESNET, dino, "DINO"),
    "ibot": (VIT, ibot, "iBOT"),
    "moco_v3_vit": (VIT, moco_v3, "MoCo v3"),
    "moco_v3_resnet": (RESNET, moco_v3, "MoCo v3"),
    "moco_v2": (RESNET, moco_v2, "MoCo v1 or v2"),
    "dinov2": (DINOV2, dinov2, "DINOv2"),
    "dinov2_registers": (REGISTERS, dinov2_registers, "DINOv2 with registers"),
    "dinov2_giant": (GIANT, dinov2_giant, "DINOv2"),
    "dinov3": (DINOV3, dinov3, "DINOv3"),
    "dinov2_training": (REGISTERS, dinov2_training, "DINOv2 with registers"),
}


def trained(backbone: Backbone) -> Encoder:
    """An encoder whose every weight is its own, norms and layer scale included."""
    torch.manual_seed(3)
    encoder = Encoder.build(backbone).eval()
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return encoder


def written(content: Any, folder: Path) -> str:
    torch.save(content, folder / "c.pth")
    return str(folder / "c.pth")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_come_back(layout: str, tmp_path: Path) -> None:
    backbone, wrap, release = LAYOUTS[layout]
    source = trained(backbone)
    address = written(wrap(dict(source.model.state_dict())), tmp_path)
    said: list[str] = []
    loaded = Encoder.build(backbone.model_copy(update={"checkpoint": address}), say=said.append).eval()
    side = backbone.img_size or 64
    image = torch.randn(2, 3, side, side)
    with torch.no_grad():
        for ours, theirs in zip(loaded(image), source(image), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    count = len(source.model.state_dict())
    assert f"{count} of {count} tensors{f' of {release}' if release else ''} loaded" in said[0]


def test_a_table_of_other_images_is_resampled_as_timm_does(tmp_path: Path) -> None:
    larger = trained(REGISTERS.model_copy(update={"img_size": 112}))
    address = written(dinov2_registers(dict(larger.model.state_dict())), tmp_path)
    loaded = Encoder.build(REGISTERS.model_copy(update={"checkpoint": address})).eval()
    image = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(loaded(image).map, larger(image).map, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("wrap", "of", "into", "words"),
    [
        (
            dinov2_registers,
            REGISTERS,
            DINOV2,
            "4 registers, layer scale of DINOv2 with registers, and the model is a ViT",
        ),
        (
            dinov2,
            DINOV2,
            VIT,
            "patches of 14 pixels, layer scale of DINOv2, and the model is a ViT of width 48, 4 blocks",
        ),
        (
            dino,
            VIT,
            VIT.model_copy(update={"kwargs": {**TINY, "depth": 5}}),
            "4 blocks.*5 blocks.*blocks.4.norm1.weight",
        ),
        (moco_v3, VIT, RESNET, "none of its"),
        (
            dino,
            RESNET,
            VIT,
            "none of its .*understood are timm's names, and the files of DINO, iBOT, DINOv2, DINOv3, MoCo",
        ),
    ],
    ids=["registers", "layer_scale", "depth", "vit_into_resnet", "resnet_into_vit"],
)
def test_a_release_of_another_network_is_refused(
    wrap: Callable[[Weights], Any], of: Backbone, into: Backbone, words: str, tmp_path: Path
) -> None:
    address = written(wrap(dict(trained(of).model.state_dict())), tmp_path)
    with pytest.raises(SourceError, match=rf"(?s)checkpoint .*c\.pth: .*{words}"):
        Encoder.build(into.model_copy(update={"checkpoint": address}))


def test_moco_v3s_small_vit_has_twelve_heads(tmp_path: Path) -> None:
    small = Backbone(name="vit_small_patch16_224", img_size=32, kwargs={"depth": 1})
    twelve = small.model_copy(update={"kwargs": {"depth": 1, "num_heads": 12}})
    address = written(moco_v3(dict(trained(twelve).model.state_dict())), tmp_path)
    Encoder.build(twelve.model_copy(update={"checkpoint": address}))
    with pytest.raises(
        SourceError, match=r"12 attention heads where the model has 6: set backbone.kwargs to \{num_heads"
    ):
        Encoder.build(small.model_copy(update={"checkpoint": address}))


def test_what_is_in_an_unknown_file_is_said(tmp_path: Path) -> None:
    address = written({"config": {"lr": 0.1}, "history": [1, 2]}, tmp_path)
    with pytest.raises(SourceError, match=r"holds no named tensors; at its top are config, history; .*understood are"):
        Encoder.build(VIT.model_copy(update={"checkpoint": address}))


class Arguments:
    """A class that a reader would have to run code of."""


def test_other_objects_are_not_read(tmp_path: Path) -> None:
    address = written({"state_dict": trained(VIT).model.state_dict(), "args": Arguments()}, tmp_path)
    with pytest.raises(SourceError, match="beside tensors it holds Python objects"):
        Encoder.build(VIT.model_copy(update={"checkpoint": address}))
