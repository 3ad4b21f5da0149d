"""Mistakes that a plan finds in the pipeline file alone."""

from __future__ import annotations

from pathlib import Path

from tests.mistakes.base import Mistake

METHOD = "{name: simclr, size: 64}"
BACKBONE = "{name: resnet18, img_size: 64}"
VIT = "{name: vit_tiny_patch16_224, img_size: 96}"


def _method(row: str, what: str, method: str, *words: str, backbone: str = BACKBONE) -> Mistake:
    """A mistake in the method, or in what it is given."""
    return Mistake(row, what, ["p.yaml:", *words], replace=[(METHOD, method), (BACKBONE, backbone)])


def _backbone(row: str, what: str, backbone: str, *words: str) -> Mistake:
    return Mistake(row, what, ["p.yaml:8: stages.warmup.backbone", *words], replace=[(BACKBONE, backbone)])


def _extends(folder: Path) -> None:
    (folder / "p.yaml").write_text("extends: baze.yaml\n")
    (folder / "base.yaml").write_text("store: store\n")


IN_CONFIGS = [
    Mistake(
        "1",
        "misspelt key",
        ["p.yaml:11", "stages.warmup.batch_sise", "batch_size"],
        replace=[("batch_size", "batch_sise")],
    ),
    Mistake(
        "2",
        "a word for a number",
        ["p.yaml:10: stages.warmup.steps", "whole number", "'four'"],
        replace=[("steps: 4", "steps: four")],
    ),
    Mistake(
        "3",
        "misspelt stage type",
        ["p.yaml:13: stages.emb.uses", "did you mean 'embeddings'"],
        replace=[("uses: embeddings", "uses: embedding")],
    ),
    Mistake(
        "4a",
        "misspelt source",
        ["p.yaml:4: stages.photos.source: nothing is at phots", "did you mean 'photos'"],
        replace=[("source: photos", "source: phots")],
    ),
    Mistake(
        "4b",
        "misspelt folder of a file",
        ["did you mean 'photos/cat/01.jpg'"],
        replace=[("source: photos", "source: photo/cat/01.jpg")],
    ),
    Mistake(
        "4c",
        "misspelt pipeline",
        ["bbb.yaml: there is no such", "this folder has p.yaml"],
        command=("plan", "bbb.yaml"),
    ),
    Mistake("4d", "misspelt base", ["p.yaml:1: extends: no file", "did you mean 'base.yaml'"], prepare=_extends),
    Mistake(
        "5",
        "input of another kind",
        ["p.yaml:13: stages.emb.encoder", "of kind images, expected encoder", "name warmup"],
        replace=[("encoder: warmup", "encoder: photos")],
    ),
    Mistake(
        "6",
        "input that no stage makes",
        ["p.yaml:13: stages.emb.encoder", "no stage is called 'warmap'", "did you mean 'warmup'"],
        replace=[("encoder: warmup", "encoder: warmap")],
    ),
    _method(
        "7", "misspelt method", "{name: simcrl}", "stages.warmup.method", "no method is called", "did you mean 'simclr'"
    ),
    Mistake(
        "9", "k of 0", ["p.yaml:14: stages.nn.k", "greater than or equal to 1, got 0"], replace=[("k: 10", "k: 0")]
    ),
    _backbone("10a", "misspelt timm name", "{name: resnet-18}", "timm has no model", "did you mean resnet18"),
    _backbone("10b", "unknown weights", "{name: resnet18.mine}", "timm has no weights", "a1_in1k"),
    Mistake(
        "11",
        "key twice",
        ["p.yaml:11: stages.warmup.steps", "twice, first in line 10"],
        replace=[("steps: 4", "steps: 4\n    steps: 5")],
    ),
    Mistake(
        "12",
        "steps and epochs",
        ["p.yaml:5: stages.warmup: epochs, steps: give exactly one"],
        replace=[("steps: 4", "steps: 4\n    epochs: 5")],
    ),
    Mistake(
        "13",
        "neither steps nor epochs",
        ["p.yaml:5: stages.warmup: epochs, steps: give exactly one"],
        replace=[("    steps: 4\n", "")],
    ),
    Mistake(
        "14",
        "embeddings for images",
        ["p.yaml:7: stages.warmup.images", "of kind embeddings, expected images", "name photos"],
        replace=[("    images: photos\n", "    images: emb\n")],
    ),
    Mistake("15a", "broken YAML", ["p.yaml:14: not valid YAML", "at column"], replace=[("  emb: {", "  emb: {{")]),
    Mistake(
        "15b",
        "a tab",
        ["p.yaml:13: not valid YAML: a tab, at column 1 (indent with spaces)"],
        replace=[("  emb: {", "\temb: {")],
    ),
    Mistake(
        "15c",
        "an anchor that is not there",
        ["p.yaml:13:", "undefined alias"],
        replace=[("images: photos, enc", "images: *p, enc")],
    ),
    _backbone("16", "image of no whole patches", VIT.replace("96", "100"), "img_size: 100", "96 or 112"),
    _method(
        "17a",
        "view of no whole patches",
        "{name: simclr, size: 100}",
        "p.yaml:9: stages.warmup.method.size: 100 pixels",
        "96 or 112",
        backbone=VIT,
    ),
    _method(
        "17b",
        "small view of no whole patches",
        "{name: dino, local_crops: {size: 40, count: 2, scale: [0.1, 0.2]}}",
        "p.yaml:9: stages.warmup.method.local_crops.size: 40 pixels",
        "32 or 48",
        backbone=VIT,
    ),
    _method(
        "17c",
        "view of a host",
        "{name: dsa, auxiliary: {name: resnet18}, host: {name: simclr, size: 100}}",
        "p.yaml:9: stages.warmup.method.host.size",
        backbone=VIT,
    ),
    Mistake(
        "17d",
        "crops and images of no whole patches behind trainings",
        [
            "p.yaml:13: stages.emb.crop: 100 pixels do not split",
            "p.yaml:15: stages.seg.test_size: 50 pixels",
            "48 or 64",
        ],
        replace=[
            (BACKBONE, VIT),
            (METHOD, METHOD.replace("64", "96")),
            ("encoder: warmup}", "encoder: warmup, crop: 100}"),
            ("k: 10}", "k: 10}\n  seg: {uses: segment_linear, images: photos, encoder: warmup, test_size: 50}"),
        ],
    ),
    _method("18", "cotap without neighbours", "{name: cotap}", "method.neighbors", "name a stage of kind neighbors"),
    _method("19", "dsa without auxiliary", "{name: dsa, host: {name: simclr}}", "auxiliary, embeddings: ", "give one"),
    _method("20a", "d3ssl without boxes", "{name: d3ssl}", "method.boxes", "name a stage of kind boxes"),
    _method("20b", "vice without superpixels", "{name: vice}", "method.superpixels", "a stage of kind superpixels"),
    _method("21a", "flsl on a ResNet", "{name: flsl}", "stages.warmup.method.tokens", "resnet18", "tokens: map"),
    _method("21b", "flsl on a plain ViT", "{name: flsl}", "backbone.class_token: false", "sincos", backbone=VIT),
    _method(
        "21c",
        "pre_last on a ResNet",
        "{name: cotap, weights: {sc_image: 0}, filter: {placement: pre_last}}",
        "stages.warmup.method.filter.placement: pre_last needs a vit",
        "set it to post",
    ),
    _method("21d", "mae on a ResNet", "{name: mae}", "stages.warmup.method.name", "name a vit_ backbone"),
    _method(
        "21e",
        "a host that needs another backbone",
        "{name: dsa, auxiliary: {name: resnet18}, host: {name: mae}}",
        "stages.warmup.method.host.name",
        "name a vit_ backbone",
    ),
    _backbone("21f", "an option of ViTs on a ResNet", "{name: resnet18, pos_embed: sincos}", "not a plain ViT"),
    Mistake(
        "22",
        "nothing to start from",
        ["p.yaml:5: stages.warmup: init, backbone: give exactly one"],
        replace=[(f"    backbone: {BACKBONE}\n", "")],
    ),
    Mistake(
        "23",
        "no type",
        ["p.yaml:5: stages.warmup: 'uses' is missing", "pretrain"],
        replace=[("    uses: pretrain\n", "")],
    ),
    Mistake(
        "25",
        "option of another stage",
        ["p.yaml:14: stages.nn.crop: unknown key", "recall_sample"],
        replace=[("k: 10", "k: 10, crop: 3")],
    ),
    Mistake(
        "26a", "empty source", ["p.yaml:4: stages.photos.source", "empty"], replace=[("source: photos", "source: ''")]
    ),
    Mistake(
        "26b", "no source", ["p.yaml:4: stages.photos.source", "got nothing"], replace=[("source: photos", "source: ")]
    ),
    Mistake(
        "27",
        "stage for stages",
        ["p.yaml:3: stage: unknown key", "did you mean 'stages'"],
        replace=[("stages:", "stage:")],
    ),
    Mistake(
        "29a", "a ring", ["emb -> nn -> emb", "remove one of these edges"], replace=[("encoder: warmup", "encoder: nn")]
    ),
    Mistake(
        "29b",
        "a stage that feeds itself",
        ["p.yaml:8: stages.warmup.init", "this stage itself"],
        replace=[(f"backbone: {BACKBONE}", "init: warmup")],
    ),
    Mistake(
        "29c", "one name twice", ["p.yaml:14: stages.emb: key 'emb' is there twice"], replace=[("  nn: ", "  emb: ")]
    ),
    Mistake(
        "30a",
        "--set of a path that is not there",
        ["--set stages.warmup.stepz=4", "did you mean 'steps'"],
        options=["--set", "stages.warmup.stepz=4"],
    ),
    Mistake(
        "30b",
        "--set of a stage that is not there",
        ["--set stages.warmupp.steps=3", "did you mean 'warmup'"],
        options=["--set", "stages.warmupp.steps=3"],
    ),
    Mistake(
        "30c",
        "--set of a wrong type",
        ["--set stages.warmup.steps=many", "whole number"],
        options=["--set", "stages.warmup.steps=many"],
    ),
    Mistake(
        "30d",
        "--set without a value",
        ["--set stages.warmup.steps: expected path=value"],
        options=["--set", "stages.warmup.steps"],
    ),
]
