"""What a listing looks like, and when a config contradicts it: never for class folders, however they are called."""

from __future__ import annotations

import re

import pytest

from stages.ingest.recognise import contradiction, recognise
from stages.ingest.settings import IngestConfig

CLASSES = ["cat/0.jpg", "cat/1.jpg", "dog/0.jpg"]
SPLIT_CLASSES = ["train/cat/0.jpg", "val/cat/0.jpg", "test/dog/1.png"]
PAIRS = ["images/train/0.jpg", "images/val/1.jpg", "masks/train/0.png", "masks/val/1.png", "classes.json"]
SPLIT_PAIRS = ["train/images/0.jpg", "train/masks/0.png", "val/images/1.jpg", "val/masks/1.png"]
CITYSCAPES = [
    "leftImg8bit/train/bonn/bonn_000000_000019_leftImg8bit.png",
    "gtFine/train/bonn/bonn_000000_000019_gtFine_labelIds.png",
    "gtFine/train/bonn/bonn_000000_000019_gtFine_color.png",
]
ADE = ["images/training/0.jpg", "annotations/training/0.png"]
COCO = ["annotations/instances_train2017.json", "train2017/0.jpg", "val2017/1.jpg"]
PANOPTIC = ["panoptic_val.json", "images/val/0.jpg", "panoptic_val/0.png"]
VOC = ["JPEGImages/0.jpg", "Annotations/0.xml", "SegmentationClass/0.png", "ImageSets/Main/train.txt"]
DAVIS = ["JPEGImages/480p/swan/00000.jpg", "Annotations/480p/swan/00000.png"]
TABLES = ["data/train-00000-of-00001.parquet", "README.md"]


@pytest.mark.parametrize(
    ("paths", "layout", "settings"),
    [
        (PAIRS, "masks", ""),
        (SPLIT_PAIRS, "masks", ""),
        (ADE, "masks", "mask_folder: annotations"),
        (["images/a/0.jpg", "masks/a/0.png"], "masks", ""),
        (
            ["images/0.jpg", "annotations/trimaps/0.png", "annotations/xmls/0.xml"],
            "masks",
            "mask_folder: annotations/trimaps",
        ),
        (COCO, "coco", ""),
        (PANOPTIC, "coco", "masks_from: panoptic"),
        (VOC, "voc", ""),
        (DAVIS, "davis", ""),
        ([path.replace("480p", "1080p") for path in DAVIS], "davis", "resolution: 1080p"),
        (TABLES, "parquet", ""),
    ],
)
def test_known_layouts(paths: list[str], layout: str, settings: str) -> None:
    look = recognise(paths)[0]
    assert (look.layout, look.settings, look.under) == (layout, settings, "")
    config = IngestConfig(source="in", layout=look.layout, **dict([settings.split(": ")] if settings else []))
    assert contradiction(config, paths) is None, "what is proposed is accepted"
    what, remedy = contradiction(IngestConfig(source="in", layout="folder"), paths) or ("", "")
    assert "looks like" in what
    assert f"layout: {layout}" in remedy
    assert settings in remedy


def test_cityscapes_names_its_suffixes_and_a_label_map() -> None:
    (look,) = recognise(CITYSCAPES)
    assert look.settings == (
        "image_folder: leftImg8bit, mask_folder: gtFine, image_suffix: _leftImg8bit, mask_suffix: _gtFine_labelIds, "
        "label_map: cityscapes19"
    )


@pytest.mark.parametrize(
    "paths",
    [
        CLASSES,
        SPLIT_CLASSES,
        ["photo.jpg"],
        ["images/0.jpg", "masks/0.jpg"],  # carnival masks: photographs
        ["images/0.png", "labels/7.png"],  # other names: no pairs
        ["masks/0.png", "faces/0.png"],  # one of the two names alone
        ["annotations/0.png", "drawings/0.png"],
        ["coco/0.jpg", "voc/0.jpg", "JPEGImages/x.txt"],
        ["instances/0.jpg", "instances.json"],
        ["flowers/rose/0.jpg", "flowers/tulip/0.jpg", "flowers/LICENSE.txt"],
    ],
)
def test_class_folders_are_no_other_layout(paths: list[str]) -> None:
    assert recognise(paths) == []
    assert contradiction(IngestConfig(source="in"), paths) is None


def test_a_layout_one_folder_deeper_is_named_with_that_folder() -> None:
    paths = [f"VOCdevkit/VOC2012/{path}" for path in VOC]
    for layout in ("voc", "folder"):
        what, remedy = contradiction(IngestConfig(source="data", layout=layout), paths) or ("", "")
        assert "VOCdevkit/VOC2012" in what
        assert "source: data/VOCdevkit/VOC2012" in remedy


def test_photographs_beside_masks_can_still_be_had() -> None:
    what, remedy = contradiction(IngestConfig(source="in"), PAIRS) or ("", "")
    assert "looks like image + mask folders (images/, masks/)" in what
    assert "for the photographs alone: source: in/images" in remedy
    assert "check_layout: false insists" in remedy
    assert contradiction(IngestConfig(source="in", check_layout=False), PAIRS) is None
    assert contradiction(IngestConfig(source="in", label="none"), COCO) is None
    assert contradiction(IngestConfig(source="in", splits={"train": "train2017"}), COCO) is None
    _, remedy = contradiction(IngestConfig(source="in", label="none"), PANOPTIC) or ("", "")
    assert "for the photographs alone: name their folder as source" in remedy


@pytest.mark.parametrize(
    ("layout", "paths", "words"),
    [
        ("masks", CLASSES, "it needs images in images/ and PNG masks in masks/.*class folders .cat, dog.: set layout"),
        ("coco", CLASSES, "no instances_<split>.json.*class folders"),
        ("voc", DAVIS, "no images in JPEGImages/; it looks like DAVIS.*set layout: davis"),
        ("davis", VOC, "JPEGImages/<resolution>/<sequence>/; it looks like VOC.*set layout: voc"),
        ("parquet", ["a.jpg"], r"no \*.parquet file.*photographs without classes: set layout: folder"),
        ("folder", ["a.tar", "b.tar", "c.md"], r"no file in it ends like an image .there are: 2 .tar, 1 .md.*unpacked"),
        ("coco", PANOPTIC, "no instances_<split>.json.*set masks_from: panoptic"),
    ],
)
def test_what_the_layout_lacks(layout: str, paths: list[str], words: str) -> None:
    said = "{} ({})".format(*(contradiction(IngestConfig(source="in", layout=layout), paths) or ("", "")))
    assert re.search(words, said), said
