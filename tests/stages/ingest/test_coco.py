"""Layout `coco`: boxes, polygons, crowd regions, drawn masks, and jsons that do not fit their images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from pipeline.errors import SourceError
from stages.data.images import decode_mask
from stages.data.object_masks import rasterise
from stages.ingest.coco_masks import check_shape, decompress
from tests.stages.ingest.conftest import Ingested

Run = Callable[..., Ingested]
Make = Callable[..., Path]
SQUARE = [[2, 2, 8, 2, 8, 8, 2, 8]]


def annotation(number: int, image: int, category: int = 7, box: Any = (2, 2, 6, 6), **more: Any) -> dict[str, Any]:
    return {
        "id": number, "image_id": image, "category_id": category, "bbox": list(box), "area": box[2] * box[3],
        "iscrowd": 0, "segmentation": SQUARE,
    } | more  # fmt: skip


def write_json(file: Path, images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> Path:
    categories = [
        {"id": 7, "name": "cup", "supercategory": "kitchen"},
        {"id": 3, "name": "cat", "supercategory": "animal"},
        {"id": 9, "name": "fork", "supercategory": "kitchen"},
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file


def image(number: int, name: str = "", width: int = 20, height: int = 10) -> dict[str, Any]:
    return {"id": number, "file_name": name or f"{number}.jpg", "width": width, "height": height}


def test_objects(tmp_path: Path, ingest: Run, make_image: Make) -> None:
    make_image(tmp_path / "in/1.jpg", 20, 10)
    make_image(tmp_path / "in/2.jpg", 20, 10)
    entries = [annotation(1, 1), annotation(2, 1, 3, (10, 4, 15, 6)), annotation(3, 1, 9, segmentation=[])]
    file = write_json(tmp_path / "a.json", [image(1), image(2)], entries)
    done = ingest(source=tmp_path / "in", layout="coco", annotations=str(file))
    first, second = done.rows
    assert [entry["category"] for entry in first["objects"]] == ["cup", "cat", "fork"]
    assert [entry["category_id"] for entry in first["objects"]] == [1, 0, 2]  # by the json's own ids: 3, 7, 9
    assert first["objects"][1]["box"] == [10, 4, 20, 10]  # clipped to the image
    assert json.loads(first["objects"][0]["mask"]) == SQUARE
    assert first["objects"][2]["mask"] is None
    assert second["objects"] == []
    assert first["mask"] is None
    assert done.outcome.notes["classes"] == ["cat", "cup", "fork"]
    assert done.outcome.notes["category_ids"] == [3, 7, 9]


def test_splits_and_folders(tmp_path: Path, ingest: Run, make_image: Make) -> None:
    """The layout as COCO is downloaded, found without a word in the config."""
    for split in ("train", "val"):
        make_image(tmp_path / f"in/{split}2017/1.jpg", 20, 10)
        write_json(tmp_path / f"in/annotations/instances_{split}2017.json", [image(1)], [annotation(1, 1)])
    found = ingest(source=tmp_path / "in", layout="coco")
    assert [(row["key"], row["split"]) for row in found.rows] == [
        ("train2017/1.jpg", "train"),
        ("val2017/1.jpg", "val"),
    ]
    files = {split: str(tmp_path / f"in/annotations/instances_{split}2017.json") for split in ("train", "val")}
    named = {"annotations": files, "splits": {"val": "val2017"}}
    assert [row["split"] for row in ingest(source=tmp_path / "in", layout="coco", **named).rows] == ["val"]


def test_largest_object_is_the_label(tmp_path: Path, ingest: Run, make_image: Make) -> None:
    for number in (1, 2):
        make_image(tmp_path / f"in/{number}.jpg", 20, 10)
    crowd = annotation(3, 1, 9, (0, 0, 20, 10), iscrowd=1, segmentation={"size": [10, 20], "counts": [0, 200]})
    entries = [annotation(1, 1, 7, area=30), annotation(2, 1, 3, area=31), crowd]
    file = write_json(tmp_path / "a.json", [image(1), image(2)], entries)
    done = ingest(source=tmp_path / "in", layout="coco", annotations=str(file), label="largest_object")
    assert [(row["label"], row["label_id"]) for row in done.rows] == [("cat", 0), (None, None)]


def test_drawn_masks(tmp_path: Path, ingest: Run, make_image: Make) -> None:
    """A small object lies over a large one, whatever the order; crowd lies under both and is ignored."""
    make_image(tmp_path / "in/1.jpg", 20, 10)
    counts = np.asfortranarray(np.pad(np.ones((10, 10), np.uint8), ((0, 0), (10, 0))))
    crowd = {"size": [10, 20], "counts": coco_mask.encode(counts)["counts"].decode()}
    entries = [
        annotation(1, 1, 7, (4, 4, 2, 2), segmentation=[[4, 4, 6, 4, 6, 6, 4, 6]]),
        annotation(2, 1, 3, (0, 0, 12, 10), segmentation=[[0, 0, 12, 0, 12, 10, 0, 10]]),
        annotation(3, 1, 9, (10, 0, 10, 10), iscrowd=1, segmentation=crowd),
    ]
    file = write_json(tmp_path / "a.json", [image(1)], entries)
    draw = {"source": tmp_path / "in", "layout": "coco", "annotations": str(file), "masks_from": "polygons"}
    done = ingest(**draw)
    assert done.outcome.notes["mask_classes"] == ["background", "cat", "cup", "fork"]
    drawn = decode_mask(done.rows[0]["mask"])
    assert drawn.shape == (10, 20)
    assert (drawn[4:6, 4:6] == 2).all()
    assert (drawn[0, :12] == 1).all()
    assert (drawn[:, 12:] == 255).all()
    other = ingest(**draw, mask_level="supercategory", crowd="class", ignore_index=99)
    assert other.outcome.notes["mask_classes"] == ["background", "animal", "kitchen"]
    assert (decode_mask(other.rows[0]["mask"])[:, 12:] == 2).all()


def test_a_json_that_does_not_fit_its_images(tmp_path: Path, ingest: Run, make_image: Make) -> None:
    for number in (1, 2, 4):
        make_image(tmp_path / f"in/{number}.jpg", 20, 10)
    (tmp_path / "secret.jpg").write_bytes((tmp_path / "in/1.jpg").read_bytes())
    images = [image(1), image(2, width=99), image(3), image(4), image(5, "../secret.jpg"), image(6, "1.jpg")]
    entries = [
        annotation(1, 1),
        annotation(2, 77),
        annotation(3, 1, 55),
        annotation(4, 4, box=(30, 30, 5, 5)),
        annotation(5, 4, segmentation={"size": [10, 20], "counts": [1, 2, 3]}),
        annotation(6, 4, segmentation=[[1, 2, 3]]),
        annotation(7, 4, segmentation={"size": [20, 10], "counts": [0, 200]}),
        annotation(8, 4, box=(0, 0, float("nan"), 1)),
        {"id": 9},
    ]
    file = write_json(tmp_path / "a.json", images, entries)
    done = ingest(source=tmp_path / "in", layout="coco", annotations=str(file))
    assert {row["key"]: len(row["objects"]) for row in done.rows} == {"1.jpg": 1, "4.jpg": 0}
    said = "\n".join(f"{problem['key']}: {problem['reason']}" for problem in done.outcome.problems)
    for expected in (
        "2.jpg: the json says 99x10 pixels, the image has 20x10",
        "3.jpg: named in a.json, but there is no such file",
        "../secret.jpg: named in a.json, but there is no such file",
        "1.jpg: named in a.json twice",
        "a.json: annotation 2: left out: image_id 77",
        "a.json: annotation 3: left out: category_id 55",
        "4.jpg: object left out: annotation 4: its box",
        "4.jpg: object left out: annotation 5: its RLE runs do not add up",
        "4.jpg: object left out: annotation 6: a polygon needs three points",
        "4.jpg: object left out: annotation 7: its RLE is not of the image's size",
        "4.jpg: object left out: annotation 8: its box",
        "a.json: annotation 9: left out",
    ):
        assert expected in said
    assert len(done.outcome.problems) == 12


@pytest.mark.parametrize("text", ["[]", "{", '{"images": []}', '{"images": {}, "annotations": [], "categories": []}'])
def test_not_a_coco_json(tmp_path: Path, ingest: Run, make_image: Make, text: str) -> None:
    make_image(tmp_path / "in/1.jpg")
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(SourceError, match=r"a\.json is not a COCO json"):
        ingest(source=tmp_path / "in", layout="coco", annotations=str(tmp_path / "a.json"))


def test_a_json_that_is_not_there(tmp_path: Path, ingest: Run, make_image: Make) -> None:
    make_image(tmp_path / "in/1.jpg")
    with pytest.raises(SourceError, match=r"gone\.json cannot be read: No such file"):
        ingest(source=tmp_path / "in", layout="coco", annotations=str(tmp_path / "gone.json"))
    with pytest.raises(SourceError, match="not of layout coco: no instances_"):
        ingest(source=tmp_path / "in", layout="coco")


@given(st.data(), st.integers(1, 12), st.integers(1, 12))
def test_rle_in_both_forms(data: st.DataObject, height: int, width: int) -> None:
    """Our own reading of the compressed string, which guards the C code, agrees with that code."""
    bits = data.draw(st.lists(st.integers(0, 1), min_size=height * width, max_size=height * width))
    mask = np.asfortranarray(np.array(bits, np.uint8).reshape(height, width))
    text = coco_mask.encode(mask)["counts"].decode()
    runs = decompress(text)
    assert sum(runs) == height * width
    for counts in (text, runs):
        shape = {"size": [height, width], "counts": counts}
        check_shape(shape, width, height)
        assert (rasterise(json.dumps(shape).encode(), width, height) == mask).all()


@given(st.text(alphabet=st.characters(min_codepoint=40, max_codepoint=120), max_size=12))
def test_broken_rle_is_refused_or_adds_up(text: str) -> None:
    try:
        check_shape({"size": [4, 5], "counts": text}, 5, 4)
    except ValueError:
        return
    assert sum(decompress(text)) == 20


def test_quickstart(quickstart_data: Path, ingest: Run) -> None:
    done = ingest(
        source=quickstart_data, layout="coco", label="largest_object", masks_from="polygons", mask_level="supercategory"
    )
    assert done.outcome.problems == []
    assert done.outcome.notes["splits"] == {"train": 22, "val": 30}
    assert done.outcome.counts == {"images": 52, "skipped": 0, "problems": 0, "masks": 52, "labels": 52, "objects": 558}
    assert len(done.outcome.notes["mask_classes"]) == 13
    present = np.unique(np.concatenate([np.unique(decode_mask(row["mask"])) for row in done.rows]))
    assert present.tolist() == [*range(13), 255]


def test_quickstart_names_its_photographs(quickstart_data: Path) -> None:
    """Every photograph is attributed, and only licences that allow redistribution are there."""
    text = (quickstart_data / "ATTRIBUTION.md").read_text()
    for split in ("train", "val"):
        content = json.loads((quickstart_data / f"instances_{split}.json").read_text())
        names = {entry["id"]: entry["name"] for entry in content["licenses"]}
        assert set(names.values()) <= {"Attribution License", "No known copyright restrictions"}
        files = {path.name for path in (quickstart_data / "images" / split).iterdir()}
        assert files == {entry["file_name"] for entry in content["images"]}
        for entry in content["images"]:
            line = next(line for line in text.splitlines() if f"images/{split}/{entry['file_name']}" in line)
            assert names[entry["license"]] in line
            assert entry["flickr_url"] in line


@pytest.mark.data
def test_boxes_of_the_development_data(dev_data: Path, ingest: Run) -> None:
    done = ingest(source=dev_data / "boxes", layout="coco", masks_from="polygons", limit=40)
    assert done.outcome.problems == []
    assert done.outcome.counts["masks"] == 40
    assert len(done.outcome.notes["classes"]) == 80
    crowds = [entry for row in done.rows for entry in row["objects"] if entry["crowd"]]
    assert crowds
    assert all(isinstance(json.loads(entry["mask"]), dict) for entry in crowds)
