"""Masks of a COCO source: polygons that are missing, panoptic jsons with their PNGs, PNGs of another folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import SourceError
from stages.data.images import decode_mask
from tests.conftest import encode
from tests.stages.ingest.conftest import Ingested
from tests.stages.ingest.test_coco import annotation, image, write_json

Run = Callable[..., Ingested]
Make = Callable[..., Path]
CATEGORIES = [
    {"id": 7, "name": "car", "supercategory": "vehicle", "isthing": 1},
    {"id": 8, "name": "bus", "supercategory": "vehicle", "isthing": 1},
    {"id": 149, "name": "road", "supercategory": "ground", "isthing": 0},
]


def segment(number: int, category: int, **more: Any) -> dict[str, Any]:
    return {"id": number, "category_id": category, "bbox": [0, 0, 2, 3], "area": 6, "iscrowd": 0} | more


@pytest.fixture
def panoptic(tmp_path: Path, make_image: Make) -> Path:
    """Columns: void, road 70000, car 1, car 2 (a crowd), bus 3."""
    folder = tmp_path / "in"
    ids = np.array([[0, 70000, 1, 2, 3]] * 3, np.uint32)
    pixels = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=2).astype(np.uint8)
    segments = [segment(70000, 149), segment(1, 7), segment(2, 7, iscrowd=1), segment(3, 8)]
    for split in ("train", "val"):
        make_image(folder / f"images/{split}/a.jpg", 5, 3)
        (folder / f"panoptic_{split}").mkdir()
        (folder / f"panoptic_{split}/a.png").write_bytes(encode(Image.fromarray(pixels), "PNG"))
        entry = {"image_id": 1, "file_name": "a.png", "segments_info": segments}
        content = {"images": [image(1, "a.jpg", 5, 3)], "annotations": [entry], "categories": CATEGORIES}
        (folder / f"panoptic_{split}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("config", "classes", "columns"),
    [
        ({}, ["car", "bus", "road"], [255, 2, 0, 255, 1]),
        ({"mask_level": "supercategory", "crowd": "class"}, ["vehicle", "ground"], [255, 1, 0, 0, 0]),
        ({"label_map": {"street": 149, "traffic": [7, 8]}, "ignore_index": 9}, ["street", "traffic"], [9, 0, 1, 9, 1]),
        ({"label_map": "coco_panoptic27"}, 27, [255, 21, 11, 255, 11]),
    ],
)
def test_panoptic(panoptic: Path, ingest: Run, config: dict[str, Any], classes: Any, columns: list[int]) -> None:
    done = ingest(source=panoptic, layout="coco", masks_from="panoptic", **config)
    found = done.outcome.notes["mask_classes"]
    assert (len(found) if isinstance(classes, int) else found) == classes
    assert {row["split"]: decode_mask(row["mask"])[0].tolist() for row in done.rows} == {
        "train": columns,
        "val": columns,
    }
    assert [(o["category"], o["crowd"]) for o in done.rows[0]["objects"]] == [
        ("car", False), ("car", True), ("bus", False),
    ]  # fmt: skip
    assert done.outcome.problems == []


def test_panoptic_that_does_not_fit(panoptic: Path, ingest: Run, make_image: Make) -> None:
    options: dict[str, Any] = {"source": panoptic, "layout": "coco", "masks_from": "panoptic"}
    content = json.loads((panoptic / "panoptic_val.json").read_text())
    content["annotations"][0]["segments_info"].pop()
    (panoptic / "panoptic_val.json").write_text(json.dumps(content))
    assert ingest(**options).reasons == {"images/val/a.jpg": "its panoptic mask has segment ids that the json lacks: 3"}
    (panoptic / "panoptic_val/a.png").unlink()
    done = ingest(**options)
    assert done.reasons == {"images/val/a.jpg": "kept without a mask: there is no a.png"}
    assert [row["mask"] is None for row in done.rows] == [False, True]
    (panoptic / "panoptic_train/a.png").unlink()
    with pytest.raises(SourceError, match=r"none of its 2 images has a mask in panoptic_<split>/.*set mask_folder"):
        ingest(**options)
    with pytest.raises(SourceError, match=r"no instances_<split>.json.*set masks_from: panoptic"):
        ingest(source=panoptic, layout="coco")
    with pytest.raises(SourceError, match=r"is a panoptic json \(set masks_from: panoptic\)"):
        ingest(source=panoptic, layout="coco", annotations=str(panoptic / "panoptic_val.json"))
    file = write_json(panoptic / "i.json", [image(1, "a.jpg")], [annotation(1, 1)])
    with pytest.raises(SourceError, match=r"is not a panoptic json: KeyError\('segments_info'\)"):
        ingest(**options, annotations=str(file))


@pytest.mark.parametrize("where", ["in the source", "outside"])
def test_boxes_with_masks_of_another_folder(
    tmp_path: Path, ingest: Run, make_image: Make, make_mask: Make, where: str
) -> None:
    for split in ("train", "val"):
        make_image(tmp_path / f"in/images/{split}/1.jpg", 20, 10)
        write_json(tmp_path / f"in/instances_{split}.json", [image(1)], [annotation(1, 1, segmentation=[])])
        values = np.array([[3, 9] * 10] * 10, np.uint8)
        folder = "in/stuff" if where == "in the source" else "elsewhere"
        make_mask(tmp_path / folder / split / "1.png", values)
    place = {"mask_folder": "stuff"} if where == "in the source" else {"mask_source": tmp_path / "elsewhere"}
    options = {"source": tmp_path / "in", "layout": "coco", "masks_from": "folder", "label_map": {3: "sky", 9: "sea"}}
    done = ingest(**options, **place)
    assert [(decode_mask(row["mask"])[0, :2].tolist(), len(row["objects"])) for row in done.rows] == [([0, 1], 1)] * 2
    assert done.outcome.notes["mask_classes"] == ["sky", "sea"]
    assert done.outcome.notes["classes"] == ["cat", "cup", "fork"]


def test_objects_without_a_polygon_are_named_and_counted(tmp_path: Path, ingest: Run, make_image: Make) -> None:
    for number in (1, 2):
        make_image(tmp_path / f"in/{number}.jpg", 20, 10)
    entries = [annotation(1, 1), annotation(2, 1, 3, segmentation=[]), annotation(3, 2)]
    file = write_json(tmp_path / "a.json", [image(1), image(2)], entries)
    done = ingest(source=tmp_path / "in", layout="coco", annotations=str(file), masks_from="polygons")
    assert done.reasons == {"1.jpg": "not in its mask, for want of a polygon: annotation 2"}
    assert done.outcome.counts["without_polygon"] == 1


def test_boxes_alone_are_no_masks(tmp_path: Path, ingest: Run, make_image: Make) -> None:
    make_image(tmp_path / "in/1.jpg", 20, 10)
    boxes = [{k: v for k, v in annotation(n, 1).items() if k != "segmentation"} for n in (1, 2)]
    file = write_json(tmp_path / "a.json", [image(1)], boxes)
    options = {"source": tmp_path / "in", "layout": "coco", "annotations": str(file)}
    with pytest.raises(SourceError, match=r"none of the 2 objects .* has a polygon.*leave masks_from out"):
        ingest(**options, masks_from="polygons")
    assert ingest(**options).outcome.counts["objects"] == 2


def test_masks_of_crowds_alone_are_called_out(tmp_path: Path, ingest: Run, make_image: Make) -> None:
    make_image(tmp_path / "in/1.jpg", 20, 10)
    crowd = annotation(1, 1, 9, (0, 0, 20, 10), iscrowd=1, segmentation={"size": [10, 20], "counts": [0, 100, 100]})
    file = write_json(tmp_path / "a.json", [image(1)], [crowd])
    done = ingest(source=tmp_path / "in", layout="coco", annotations=str(file), masks_from="polygons")
    (line,) = [line for line in done.said if "split train" in line]
    assert "holds one class only, background (value 0): evaluations refuse" in line
    assert line in done.outcome.notes["remarks"]
    assert done.outcome.notes["contents"]["train"]["mask_values"] == [0]
