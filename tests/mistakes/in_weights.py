"""Checkpoints that cannot be used, which a run refuses before it starts anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.mistakes.base import Mistake


def _cut_off(file: Path) -> None:
    import torch

    torch.save({"conv1.weight": torch.zeros(100, 100)}, file)
    file.write_bytes(file.read_bytes()[:3000])


def _objects(file: Path) -> None:
    import torch

    torch.save(torch.nn.Linear(2, 2), file)


def _of_a_vit(file: Path) -> None:
    import torch

    torch.save({"cls_token": torch.zeros(1, 1, 8), "blocks.0.norm1.weight": torch.zeros(8)}, file)


def _checkpoint(row: str, what: str, make: Callable[[Path], None], *words: str) -> Mistake:
    return Mistake(
        row,
        what,
        ["p.yaml:8: stages.warmup.backbone.checkpoint: w.pth: ", *words],
        replace=[("img_size: 64}", "img_size: 64, checkpoint: w.pth}")],
        prepare=lambda folder: make(folder / "w.pth"),
        command=("run", "p.yaml"),
    )


IN_WEIGHTS = [
    Mistake(
        "38b",
        "a checkpoint that is not there",
        ["p.yaml:8: stages.warmup.backbone.checkpoint: nothing is at w.pth", "this folder has p.yaml, photos"],
        replace=[("img_size: 64}", "img_size: 64, checkpoint: w.pth}")],
    ),
    _checkpoint("38c", "a checkpoint cut off", _cut_off, "it is cut off or damaged", "save its state dict"),
    _checkpoint("38d", "a checkpoint with objects", _objects, "holds Python objects", "save its state dict"),
    _checkpoint(
        "38e", "a checkpoint of another model", _of_a_vit, "none of its 2 tensors fits", "cls_token", "conv1.weight"
    ),
    Mistake(
        "38f",
        "weights that timm does not have",
        ["p.yaml:8: stages.warmup.backbone.pretrained: timm has no weights for resnet50t", "checkpoint:"],
        replace=[("{name: resnet18, img_size: 64}", "{name: resnet50t, pretrained: true}")],
        command=("run", "p.yaml"),
    ),
]
