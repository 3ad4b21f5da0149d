"""The configs of the papers' tables: each fits small folders of the layouts that its header describes.

Planned without the images, then with them: an ingest that has run answers what a later stage asks of its images. All
configs share one store, so that each data set is ingested once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from pipeline.config.load import Pipeline, load_pipeline
from pipeline.plan.plan import Plan, check_inputs, make_plan
from pipeline.stage import Context, Resources
from pipeline.store.store import ArtifactStore
from stages.finetune.settings import FinetuneConfig
from tests.conftest import encode, smooth_pixels

FOLDER = Path(__file__).parents[1] / "configs" / "evaluation"
CONFIGS = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml"))
TABLES = [name for name in CONFIGS if "/" not in name]
SIZE = (48, 32)
COUNT = 24  # images of a split: more than the 20 neighbours of a k-NN


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def photograph(path: Path, number: int) -> None:
    write(path, encode(smooth_pixels(*SIZE, number), "PNG" if path.suffix == ".png" else "JPEG"))


def mask(path: Path, left: int, right: int, *, palette: bool = False) -> None:
    values = np.full((SIZE[1], SIZE[0]), left, np.uint8)
    values[:, SIZE[0] // 2 :] = right
    image = Image.fromarray(values)
    if palette:
        image.putpalette([0, 0, 0, 128, 0, 0])  # the values become indices
    write(path, encode(image, "PNG"))


def coco(images: Mapping[str, Path], jsons: Mapping[str, Path], categories: list[str], masks: Path | None) -> None:
    """Images, their json and their masks, of each split."""
    for split, folder in images.items():
        listed, objects = [], []
        for number in range(COUNT):
            photograph(folder / f"{number:012d}.jpg", number)
            if masks is not None:
                mask(masks / split / f"{number:012d}.png", 0, 156)
            listed.append({"id": number, "file_name": f"{number:012d}.jpg", "width": SIZE[0], "height": SIZE[1]})
            polygon = [2, 2, 30, 2, 30, 20, 2, 20]
            entry = {"id": number, "image_id": number, "category_id": 1 + number % len(categories), "iscrowd": 0}
            objects.append(entry | {"bbox": [2, 2, 28, 18], "area": 504, "segmentation": [polygon]})
        kinds = [{"id": n, "name": name, "supercategory": "thing"} for n, name in enumerate(categories, 1)]
        write(jsons[split], json.dumps({"images": listed, "annotations": objects, "categories": kinds}).encode())


def class_folders(folder: Path) -> None:
    for split in ("train", "val"):
        for number in range(COUNT):
            photograph(folder / split / f"n{number % 6}" / f"{number}.JPEG", number)


def voc(folder: Path, image_set: str, splits: tuple[str, str], *, masks: bool) -> None:
    for i, split in enumerate(splits):
        names = [f"2007_{i * COUNT + number:06d}" for number in range(COUNT)]
        for number, name in enumerate(names):
            photograph(folder / "JPEGImages" / f"{name}.jpg", number)
            if masks:
                mask(folder / "SegmentationClass" / f"{name}.png", 0, 1, palette=True)
                continue
            root = ElementTree.Element("annotation")
            entry = ElementTree.SubElement(root, "object")
            ElementTree.SubElement(entry, "name").text = "dog"
            box = ElementTree.SubElement(entry, "bndbox")
            for key, value in {"xmin": 3, "ymin": 3, "xmax": 30, "ymax": 20}.items():
                ElementTree.SubElement(box, key).text = str(value)
            write(folder / "Annotations" / f"{name}.xml", ElementTree.tostring(root))
        write(folder / "ImageSets" / image_set / f"{split}.txt", "\n".join(names).encode())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with every data set under data/, and a store."""
    root = tmp_path_factory.mktemp("tables")
    data = root / "data"
    for name in ("vit_small.pth", "flsl_vit_small.pth", "flsl_vit_base.pth", "resnet50.pth", "vice_resnet50.pth"):
        write(data / "checkpoints" / name, name.encode())  # read when it runs, not when it is planned
    for name in ("imagenet", "fc100", "cub200", "plant_disease"):
        class_folders(data / name)
    named = {split: data / "coco" / "annotations" / f"instances_{split}.json" for split in ("train2017", "val2017")}
    coco({split: data / "coco" / split for split in named}, named, ["person", "cup"], data / "cocostuff")
    for name, kinds in (("uavdt", ["car", "truck", "bus"]), ("imagenet_boxes", ["n1", "n2"])):
        jsons = {split: data / name / f"instances_{split}.json" for split in ("train", "val")}
        coco({split: data / name / "images" / split for split in jsons}, jsons, kinds, None)
    voc(data / "voc12", "Segmentation", ("trainaug", "val"), masks=True)
    voc(data / "voc0712", "Main", ("trainval", "test"), masks=False)
    voc(data / "voc07", "Main", ("trainval", "test"), masks=False)
    for number in range(COUNT):
        for split in ("training", "validation"):
            photograph(data / "ade20k" / "images" / split / f"ADE_{number}.jpg", number)
            mask(data / "ade20k" / "annotations" / split / f"ADE_{number}.png", number % 3, 150)
        for split in ("train", "val"):
            name = f"{split}/ulm/ulm_{number:06d}_000019"
            photograph(data / "cityscapes" / "leftImg8bit" / f"{name}_leftImg8bit.png", number)
            mask(data / "cityscapes" / "gtFine" / f"{name}_gtFine_labelIds.png", 7, 26)
            mask(data / "cityscapes" / "gtFine" / f"{name}_gtFine_instanceIds.png", 7, 26)
    for video in ("dogs", "swan"):
        for number in range(3):
            photograph(data / "davis" / "JPEGImages" / "480p" / video / f"{number:05d}.jpg", number)
            mask(data / "davis" / "Annotations" / "480p" / video / f"{number:05d}.png", 0, 1, palette=True)
    write(data / "davis" / "ImageSets" / "2017" / "val.txt", b"dogs\n")
    write(data / "davis" / "ImageSets" / "2017" / "train.txt", b"swan\n")
    return root


def planned(name: str, store: ArtifactStore) -> tuple[Pipeline, Plan]:
    """The plan of a config, with batches that the small sets can fill, in one process."""
    overrides = []
    for stage, entry in load_pipeline(FOLDER / name).stages.items():
        if isinstance(entry.stage.config, FinetuneConfig):
            few = 1 if entry.uses == "finetune_classification" else 2  # of 24 images, one has a label at 1 %
            small = {"batch_size": few, "accumulate": 1, "resources.workers": 0, "resources.gpus": 0}
            overrides += [f"stages.{stage}.{key}={value}" for key, value in small.items()]
    pipeline = load_pipeline(FOLDER / name, overrides, store.address)
    return pipeline, make_plan(pipeline, store)


def ingest(plan: Plan, pipeline: Pipeline, store: ArtifactStore) -> None:
    """Run those stages of a plan that read images from files, where the store does not have them."""
    for name, stage in plan.needed.items():
        if pipeline.stages[name].uses != "ingest" or stage.artifact is not None:
            continue
        writer, said = store.begin(stage.kind, stage.fingerprint), []
        context = Context(name, stage.fingerprint, {}, writer, Resources(), say=said.append)
        outcome = pipeline.stages[name].stage.run(context)
        assert outcome.problems == []
        assert len(said) == 1, "what was read, and nothing against it"
        stage.artifact = writer.commit(counts=outcome.counts, notes=outcome.notes, preview=outcome.preview)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_table_fits_its_images(name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    as_written = load_pipeline(FOLDER / name, (), str(tmp_path / "store"))
    plan = make_plan(as_written, ArtifactStore(str(tmp_path / "store")))
    assert [stage.reasons for stage in plan.stages] == [["new"]] * len(as_written.stages)

    store = ArtifactStore(str(place / "store"))
    pipeline, plan = planned(name, store)
    assert set(plan.needed) == set(pipeline.stages)
    ingest(plan, pipeline, store)
    assert check_inputs(pipeline, plan.needed, {*pipeline.stages}) == []


@pytest.mark.parametrize("name", TABLES)
def test_a_table_evaluates_the_one_encoder_and_says_what_it_is(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    pipeline = load_pipeline(FOLDER / name)
    encoders = {entry.inputs["encoder"] for entry in pipeline.stages.values() if "encoder" in entry.inputs}
    assert encoders == {"encoder"}
    assert pipeline.stages["encoder"].sources["backbone.checkpoint"].startswith("data/checkpoints/")
    header = (FOLDER / name).read_text().split("\nextends:")[0]
    for part in (f"tessera run configs/evaluation/{name}", "\n# Data: ", "Encoder", "\n# P", "\n# Paper"):
        assert part in header
    overrides = ["stages.encoder.backbone.checkpoint=mine.pth"]
    mine = load_pipeline(FOLDER / name, overrides).stages["encoder"]
    assert mine.sources["backbone.checkpoint"] == "mine.pth"


def test_the_list_of_tables_names_every_config() -> None:
    text = (FOLDER / "README.md").read_text()
    assert [name for name in TABLES if f"`{name}`" not in text] == []


def test_an_encoder_of_a_pipeline_takes_the_place_of_the_file(tmp_path: Path) -> None:
    """The example of README.md."""
    example = (FOLDER / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
    file = tmp_path / "mine.yaml"
    file.write_text(example.replace("configs/", f"{FOLDER.parent}/"))
    pipeline = load_pipeline(file)
    assert "encoder" not in pipeline.stages
    assert pipeline.stages["davis_features"].inputs["encoder"] == "cotap"
    assert pipeline.stages["cotap"].uses == "pretrain"
