"""Mistakes in the sizes at which an encoder is given images: a plan finds them."""

from __future__ import annotations

from tests.mistakes.base import Mistake

RESNET = "{name: resnet18, img_size: 64}"
VIT = "{name: vit_tiny_patch16_224, img_size: 64}"
NN = "  nn: {uses: neighbors"


def _size(row: str, uses: str, more: str, *words: str) -> Mistake:
    """A further stage, beside those of the pipeline, that is fed by a ViT with patches of 16 pixels."""
    stage = f"  more: {{uses: {uses}, images: photos, {more}}}\n"
    words = ("p.yaml:14: stages.more.", *words)
    return Mistake(row, f"{uses} at no whole patches", words, replace=[(RESNET, VIT), (NN, stage + NN)])


IN_FEATURES = [
    _size("16a", "embeddings", "encoder: warmup, crop: 100", "crop: 100 pixels do not split into patches of 16"),
    _size("16b", "features", "encoder: warmup, size: 40", "size: 40 pixels", "set it to 32 or 48"),
    _size("16c", "segment_linear", "encoder: warmup, test_size: 300", "test_size: 300 pixels", "set it to 288 or 304"),
    _size("16d", "classify_knn", "encoder: warmup, crop: 90", "crop: 90 pixels", "set it to 80 or 96"),
    _size(
        "16e",
        "features",
        "backbone: {name: vit_tiny_patch16_224, patch_size: 8}, size: 100",
        "size: 100 pixels do not split into patches of 8",
        "set it to 96 or 104",
    ),
    _size(
        "16f",
        "features",
        "backbone: {name: beit_base_patch16_224}, size: 96",
        "size: beit_base_patch16_224 takes images of 224 pixels only, not of 96",
        "set it to 224, or backbone.img_size to 96",
    ),
    _size(
        "16g",
        "features",
        "backbone: {name: convnext_atto, stride: 2}",
        "stride: the levels of convnext_atto have strides 4, 8, 16, 32, none of 2",
        "name one of them",
    ),
    _size(
        "16h",
        "features",
        "backbone: {name: swin_tiny_patch4_window7_224}, layer: 5",
        "layer: swin_tiny_patch4_window7_224 has levels 1 to 4, and no 5",
    ),
    _size("16i", "finetune_classification", "encoder: warmup, steps: 1, size: 100", "size: 100", "set it to 96 or 112"),
    _size("16j", "finetune_segmentation", "encoder: warmup, steps: 1, size: 90", "size: 90 pixels", "set it to 80 or"),
    _size("16k", "finetune_detection", "encoder: warmup, steps: 1, square: 90", "square: 90", "set it to 80 or 96"),
]
