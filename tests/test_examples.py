"""The configs that users start from: each fits a small folder of the layout that its header describes.

Planned without the images, then with them: an ingest that has run answers what a later stage asks of its images.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config.load import load_pipeline
from pipeline.plan.plan import check_inputs, make_plan
from pipeline.stage import Context, Resources
from pipeline.store.store import ArtifactStore
from tests.conftest import encode, smooth_pixels

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "configs" / "examples"
SIZE = (64, 48)
PHOTOGRAPHS = 12  # of each split: as many as the k of the examples' k-NN needs


def photograph(path: Path, number: int) -> None:
    write(path, encode(smooth_pixels(*SIZE, number)))


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def flowers(folder: Path) -> None:
    kinds = ("daisy", "dandelion", "rose", "sunflower", "tulip")
    for split in ("train", "val"):
        for number in range(PHOTOGRAPHS):
            photograph(folder / split / kinds[number % len(kinds)] / f"{number}.jpg", number)


def street(folder: Path) -> None:
    categories = [{"id": n, "name": str(n), "isthing": int(n >= 24), "supercategory": "all"} for n in (7, 23, 26)]
    ids = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    ids[10:, :, 0], ids[30:, :32, 1], ids[30:, 32:, 2] = 5, 6, 7
    segments = [(5, 7), (5 + (6 << 8), 23), (5 + (7 << 16), 26)]
    infos = [{"id": n, "category_id": c, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 0} for n, c in segments]
    for split in ("train", "val"):
        images, annotations = [], []
        for number in range(3):
            photograph(folder / "images" / split / f"{number}.jpg", number)
            write(folder / f"panoptic_{split}" / f"{number}.png", encode(Image.fromarray(ids), "PNG"))
            images.append({"id": number, "file_name": f"{number}.jpg", "width": SIZE[0], "height": SIZE[1]})
            annotations.append({"image_id": number, "file_name": f"{number}.png", "segments_info": infos})
        content = {"images": images, "annotations": annotations, "categories": categories}
        write(folder / f"panoptic_{split}.json", json.dumps(content).encode())


def boxes(folder: Path) -> None:
    categories = [{"id": 1, "name": "cup"}, {"id": 2, "name": "cat"}]
    for split in ("train", "val"):
        images, annotations = [], []
        for number in range(PHOTOGRAPHS):
            photograph(folder / "images" / split / f"{number}.jpg", number)
            images.append({"id": number, "file_name": f"{number}.jpg", "width": SIZE[0], "height": SIZE[1]})
            box = {"id": number, "image_id": number, "category_id": 1 + number % 2, "bbox": [2, 2, 9 + number, 9]}
            annotations.append(box | {"iscrowd": 0})
        content = {"images": images, "annotations": annotations, "categories": categories}
        write(folder / f"instances_{split}.json", json.dumps(content).encode())


def video(folder: Path) -> None:
    mask = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    mask[10:30, 10:40] = 255
    for split, sequence in (("train", "swan"), ("val", "dog")):
        lines = ""
        for number in range(3):
            frame = f"480p/{sequence}/{number:05d}"
            photograph(folder / "JPEGImages" / f"{frame}.jpg", number)
            write(folder / "Annotations" / f"{frame}.png", encode(Image.fromarray(mask), "PNG"))
            lines += f"/JPEGImages/{frame}.jpg /Annotations/{frame}.png\n"
        write(folder / f"ImageSets/480p/{split}.txt", lines.encode())


@pytest.mark.parametrize("make", [flowers, street, boxes, video], ids=lambda make: make.__name__)
def test_an_example_fits_its_images(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "images")
    loaded = load_pipeline(EXAMPLES / f"{make.__name__}.yaml")
    images = next(name for name, stage in loaded.stages.items() if stage.uses == "ingest")
    overrides = [f"stages.{images}.source={tmp_path / 'images'}"]
    # A batch must not be larger than the set, and these sets are a few images.
    overrides += [f"stages.{name}.batch_size=2" for name, stage in loaded.stages.items() if stage.uses == "pretrain"]
    pipeline = load_pipeline(EXAMPLES / f"{make.__name__}.yaml", overrides, str(tmp_path / "store"))
    store = ArtifactStore(str(tmp_path / "store"))
    plan = make_plan(pipeline, store)
    assert [stage.reasons for stage in plan.stages] == [["new"]] * len(pipeline.stages)

    planned, entry = plan.needed[images], pipeline.stages[images]
    writer, said = store.begin(planned.kind, planned.fingerprint), []
    context = Context(images, planned.fingerprint, {}, writer, Resources(), say=said.append)
    outcome = entry.stage.run(context)
    assert outcome.problems == []
    assert len(said) == 1, "what was read, and nothing against it"
    planned.artifact = writer.commit(counts=outcome.counts, notes=outcome.notes, preview=outcome.preview)
    assert check_inputs(pipeline, plan.needed, set(pipeline.stages) - {images}) == []


def test_every_example_has_its_test() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == {
        make.__name__ for make in (flowers, street, boxes, video)
    }
