"""Mistakes in the images: a layout that is another one, masks and labels that do not fit, files that are no images."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.conftest import encode, smooth_pixels
from tests.mistakes.base import Mistake

ONLY_IMAGES = ("--only", "photos")
RUN = ("run", "p.yaml")
KNN = ("  nn: {", "  knn: {uses: classify_knn, images: photos, encoder: warmup, k: 5, resize: 72, crop: 64}\n  nn: {")
SEGMENT = ("  nn: {", "  seg: {uses: segment_linear, images: photos, encoder: warmup}\n  nn: {")


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder / "photos")
    return folder / "photos"


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _masks(*values: int) -> Callable[[Path], None]:
    """Images and masks of 3 train and 3 val images, with classes sky and road."""

    def prepare(folder: Path) -> None:
        source = _fresh(folder)
        for number in range(6):
            split = "val" if number % 2 else "train"
            mask = np.resize(np.array(values, np.uint8), (24, 32))
            _write(source / f"images/{split}/{number}.jpg", encode(smooth_pixels(32, 24, number)))
            _write(source / f"masks/{split}/{number}.png", encode(Image.fromarray(mask), "PNG"))
        (source / "classes.json").write_text('{"classes": ["sky", "road"]}')

    return prepare


def _boxes(folder: Path) -> None:
    """A detection set: boxes, no polygons, and one image that is not there."""
    source = _fresh(folder)
    images, objects = [], []
    for number in range(4):
        if number:
            _write(source / f"train/{number}.jpg", encode(smooth_pixels(32, 24, number)))
        images.append({"id": number, "file_name": f"{number}.jpg", "width": 32, "height": 24})
        objects.append({"id": number, "image_id": number, "category_id": 1, "bbox": [2, 2, 9, 9], "iscrowd": 0})
    content = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "cat"}]}
    (source / "instances_train.json").write_text(json.dumps(content))


def _ingest(folder: Path) -> None:
    """Runs the ingest alone, so that a plan knows its counts."""
    command = [sys.executable, "-m", "pipeline.cli", *RUN, *ONLY_IMAGES]
    subprocess.run(command, cwd=folder, env=os.environ | {"TESSERA_CACHE": str(folder / "cache")}, check=True)


def _odd_files(folder: Path) -> None:
    source, good = folder / "photos", encode(smooth_pixels(96, 80, 1))
    _write(source / "cat/cut.jpg", good[:-90])
    _write(source / "cat/empty.jpg", b"")
    _write(source / "cat/phone.heic", b"\0\0\0\x18ftypheic")
    _write(source / "dog/really_a.jpg", encode(Image.fromarray(smooth_pixels(96, 80)), "TIFF"))
    _write(source / "dog/huge.png", encode(Image.new("1", (9000, 8000)), "PNG"))
    _write(source / "dog/print.jpg", encode(Image.fromarray(smooth_pixels(96, 80)).convert("CMYK")))
    _write(folder / "elsewhere.jpg", good)
    (source / "dog/link.jpg").symlink_to(folder / "elsewhere.jpg")
    with open(os.fsencode(source) + b"/dog/caf\xe9.jpg", "wb") as file:
        file.write(good)


def _only(*names: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        source = _fresh(folder)
        source.mkdir()
        for name in names:
            _write(source / name, encode(smooth_pixels(96, 80)) if name.endswith(".jpg") else b"x")

    return prepare


def _splits(train: dict[str, int], val: dict[str, int]) -> Callable[[Path], None]:
    """Class folders in two splits, with so many photographs each."""

    def prepare(folder: Path) -> None:
        source = _fresh(folder)
        for split, classes in (("train", train), ("val", val)):
            for name, count in classes.items():
                for number in range(count):
                    _write(source / split / name / f"{number}.jpg", encode(smooth_pixels(96, 80, number)))

    return prepare


IN_IMAGES = [
    Mistake(
        "8a",
        "masks on class folders",
        [
            "p.yaml:4",
            "stages.photos.layout",
            "is not of layout masks",
            "class folders (cat, dog)",
            "set layout: folder",
        ],
        replace=[("layout: folder", "layout: masks")],
    ),
    Mistake(
        "8b",
        "folder on images and masks",
        ["p.yaml:4", "stages.photos.layout", "looks like image + mask folders (images/, masks/)", "set layout: masks"],
        prepare=_masks(0, 1),
    ),
    Mistake(
        "8c",
        "coco on class folders",
        ["stages.photos.layout", "no instances_<split>.json", "class folders (cat, dog)"],
        replace=[("layout: folder", "layout: coco")],
    ),
    Mistake(
        "8d",
        "folder on COCO",
        ["looks like COCO (instances_train.json)", "set layout: coco", "label: none"],
        prepare=_boxes,
    ),
    Mistake(
        "8e",
        "the json in place of its folder",
        [
            "stages.photos.source",
            "looks like a COCO json",
            "set layout: coco, annotations: photos/instances_train.json",
        ],
        replace=[("source: photos", "source: photos/instances_train.json")],
        prepare=_boxes,
    ),
    Mistake(
        "8f",
        "folder on images and masks, insisted on",
        ["photos", "run"],
        code=0,
        replace=[("layout: folder", "layout: folder, check_layout: false")],
        prepare=_masks(0, 1),
    ),
    Mistake(
        "28a",
        "k-NN of more neighbours than train images",
        ["stages.knn.k", "k is 5, but split 'train' of photos has 4 labelled images", "set it to 4 or less"],
        code=1,
        replace=[KNN],
        prepare=_splits({"cat": 2, "dog": 2}, {"cat": 1}),
        command=RUN,
    ),
    Mistake(
        "28b",
        "a class of one image",
        ["1 class has one image only", "no k-nn can find", "dog"],
        code=0,
        prepare=_splits({"cat": 6, "dog": 1}, {"cat": 2}),
        command=RUN,
        options=ONLY_IMAGES,
    ),
    Mistake(
        "31a",
        "segmentation of images without masks",
        ["p.yaml:14", "stages.seg.images", "photos has no masks: none of its 32 images has a mask", "masks_from"],
        code=1,
        replace=[SEGMENT],
        command=RUN,
    ),
    Mistake(
        "31b",
        "k-NN of a split that is not there",
        ["stages.knn.test_split", "photos has no image of split 'val' (images by split: train: 32)", "splits"],
        code=1,
        replace=[KNN],
        command=RUN,
    ),
    Mistake(
        "31c",
        "the same with the images cached",
        ["p.yaml:14", "stages.seg.images", "photos has no masks: none of its 32 images has a mask"],
        replace=[SEGMENT],
        prepare=_ingest,
    ),
    Mistake(
        "32a",
        "sparse mask values",
        [
            "has no usable image",
            "images/train/0.jpg: its mask has the value 7, 26, outside the 2 classes",
            "problems.txt",
            "label_map: {7: road",
        ],
        code=1,
        replace=[("layout: folder", "layout: masks")],
        prepare=_masks(7, 26),
        command=RUN,
        options=ONLY_IMAGES,
    ),
    Mistake(
        "32b",
        "masks of one class",
        ["stages.seg.train_split", "the masks of split 'train' of photos hold one class only, sky (value 0)"],
        code=1,
        replace=[("layout: folder", "layout: masks"), SEGMENT],
        prepare=_masks(0),
        command=RUN,
    ),
    Mistake(
        "33a",
        "polygons of boxes",
        ["masks_from: polygons, but none of the 3 objects", "has a polygon", "leave masks_from out"],
        code=1,
        replace=[("layout: folder", "layout: coco, masks_from: polygons")],
        prepare=_boxes,
        command=RUN,
        options=ONLY_IMAGES,
    ),
    Mistake(
        "33b",
        "a json that names a missing file",
        ["train/0.jpg: named in instances_train.json, but there is no such file", "3 images", "1 problems"],
        code=0,
        replace=[("layout: folder", "layout: coco")],
        prepare=_boxes,
        command=RUN,
        options=ONLY_IMAGES,
    ),
    Mistake(
        "34",
        "files that are no photographs",
        [
            "cat/cut.jpg: damaged: ",
            "cat/empty.jpg: the file is empty",
            "cat/phone.heic: not a format that is read",
            "dog/really_a.jpg: a TIFF file",
            "dog/huge.png: 9000x8000 pixels are more than the limit",
            "CMYK, converted without its colour profile (dog/print.jpg)",
            "1 link out of the source, read as part of it: dog/link.jpg",
            "dog/caf\\xe9.jpg: its name is not utf-8",
            "34 images, 4 skipped, 6 problems",
        ],
        code=0,
        prepare=_odd_files,
        command=RUN,
        options=ONLY_IMAGES,
    ),
    Mistake("35a", "an empty folder", ["p.yaml:4", "stages.photos.source", "no file in photos"], prepare=_only()),
    Mistake(
        "35b",
        "system files alone",
        ["source photos has no image", "there are: 1 .db", "name the folder that holds the images"],
        prepare=_only("Thumbs.db", ".DS_Store"),
    ),
    Mistake(
        "35c",
        "one image",
        ["the source has one image only"],
        code=0,
        prepare=_only("a.jpg"),
        command=RUN,
        options=ONLY_IMAGES,
    ),
]
