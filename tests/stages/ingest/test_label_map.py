"""Label maps: both ways to write one, the shipped ones, and masks whose values are sparse ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from pipeline.errors import SourceError
from pipeline.plan.fingerprint import identity
from pipeline.plan.fingerprint import settings as dumped
from stages.data.images import decode_mask
from stages.ingest import label_map
from stages.ingest.settings import IngestConfig
from stages.ingest.stage import Ingest
from tests.conftest import encode
from tests.stages.ingest.conftest import Ingested

Run = Callable[..., Ingested]
Make = Callable[..., Path]


@pytest.fixture
def street(tmp_path: Path, make_image: Make, make_mask: Make) -> Path:
    """Masks of Cityscapes' ids: road 7, car 26, void 0 and 255."""
    for number, split in enumerate(("train", "val")):
        make_image(tmp_path / f"in/images/{split}/{number}.jpg", 4, 3)
        make_mask(tmp_path / f"in/masks/{split}/{number}.png", np.array([[7, 26, 0, 255]] * 3, np.uint8))
    return tmp_path / "in"


@pytest.mark.parametrize(
    "written",
    [
        {7: "road", 26: "vehicle", 27: "vehicle", 0: None},
        {"road": 7, "vehicle": [26, 27]},
        {"7": "road", "26": "vehicle"},
    ],
)
def test_both_ways_to_write_it(street: Path, ingest: Run, written: dict[Any, Any]) -> None:
    done = ingest(source=street, layout="masks", label_map=written)
    assert done.outcome.notes["mask_classes"] == ["road", "vehicle"]
    for row in done.rows:
        assert decode_mask(row["mask"])[0].tolist() == [0, 1, 255, 255]
    values = "255" if 0 in written else "0, 255"
    assert f"mask values that label_map does not list count for nothing: {values}" in done.said


def test_a_file_and_a_shipped_map(street: Path, ingest: Run, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps({"7": "road", "26": "car"}))
    (tmp_path / "map.yaml").write_text("road: 7\ncar: [26]\n")
    for name in ("map.json", "map.yaml"):
        done = ingest(source=street, layout="masks", label_map=str(tmp_path / name))
        assert done.outcome.notes["mask_classes"] == ["road", "car"]
    done = ingest(source=street, layout="masks", label_map="cityscapes19")
    assert done.outcome.notes["mask_classes"][13] == "car"
    assert decode_mask(done.rows[0]["mask"])[0].tolist() == [0, 13, 255, 255]
    (tmp_path / "map.json").write_text('{"7": 3}')
    with pytest.raises(
        SourceError, match=r"label map .*map\.json is not usable: value 7 of the label map needs the name"
    ):
        ingest(source=street, layout="masks", label_map=str(tmp_path / "map.json"))


def test_an_ignore_index_of_the_config(street: Path, ingest: Run) -> None:
    done = ingest(source=street, layout="masks", label_map={7: "road", 26: "car"}, ignore_index=9)
    assert decode_mask(done.rows[0]["mask"])[0].tolist() == [0, 1, 9, 9]
    with pytest.raises(SourceError, match="ignore_index 1 is one of the 2 classes"):
        ingest(source=street, layout="masks", label_map={7: "road", 26: "car"}, ignore_index=1)


def test_the_shipped_maps() -> None:
    sizes = {}
    for name in label_map.shipped():
        made = label_map.read((label_map.SHIPPED / f"{name}.yaml").read_text(), name)
        assert len(set(made.names)) == len(made.names)
        assert set(made.index_of.values()) == set(range(len(made.names)))
        sizes[name] = (len(made.names), len(made.index_of))
    assert sizes == {
        "ade20k": (150, 150),
        "cityscapes19": (19, 19),
        "cityscapes27": (27, 27),
        "coco_panoptic27": (27, 80 + 91 + 17),
        "coco_stuff27": (27, 80 + 91),
    }  # fmt: skip


def test_coarse_classes_agree_with_the_quickstarts_supercategories(quickstart_data: Path) -> None:
    made = label_map.read((label_map.SHIPPED / "coco_panoptic27.yaml").read_text(), "x")
    stuff = label_map.read((label_map.SHIPPED / "coco_stuff27.yaml").read_text(), "x")
    categories = json.loads((quickstart_data / "instances_val.json").read_text())["categories"]
    assert categories
    for entry in categories:
        assert made.names[made.index_of[entry["id"]]] == entry["supercategory"]
        assert stuff.names[stuff.index_of[entry["id"] - 1]] == entry["supercategory"]


@pytest.mark.parametrize(
    ("written", "rule"),
    [
        ("citiscapes19", "neither a file of JSON or YAML nor a shipped map .ade20k, cityscapes19"),
        ({7: ["road"]}, "value 7 of the label map needs the name of a class"),
        ({"road": "seven"}, "class 'road' of the label map needs a value or a list"),
        ({"road": 7, "car": [26, 7]}, "value 7 of the label map has two classes, road and car"),
        ({7: "road", "car": 26}, "either from values to classes or from classes to values"),
        ({7: None}, "names no class"),
        ({-1: "road"}, "a label map|not one that a mask can hold"),
        ({70000: "road"}, "not one that a mask can hold"),
        ({}, "a label map is a mapping"),
    ],
)
def test_maps_that_are_wrong(written: Any, rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        IngestConfig(source="x", layout="masks", label_map=written)


def test_where_it_does_not_belong() -> None:
    for config, rule in (
        ({"layout": "folder"}, "label_map is for layout masks or coco"),
        ({"layout": "coco"}, "label_map is for masks that are files, this has masks_from: none"),
        ({"layout": "coco", "masks_from": "polygons"}, "mask_level: supercategory makes drawn classes coarse"),
        ({"layout": "masks", "classes": ["road"]}, "label_map names the classes of the masks itself"),
    ):
        with pytest.raises(ValidationError, match=rule):
            IngestConfig(source="x", label_map={7: "road"}, **config)


def test_what_is_not_set_is_not_part_of_the_fingerprint() -> None:
    """Sources that were ingested before an option existed are not ingested again."""
    plain = identity("ingest", Ingest(IngestConfig(source="x")), {"source": "1"}, {})
    assert not {"label_map", "mask_source", "check_layout"} & set(plain["settings"])
    insisting = identity("ingest", Ingest(IngestConfig(source="x", check_layout=False)), {"source": "1"}, {})
    assert insisting == plain
    mapped = IngestConfig(source="x", layout="masks", label_map="cityscapes19")
    assert dumped(mapped)["label_map"]["road"] == [7], "a shipped map counts by its content"


def test_sparse_values_without_a_map_name_the_remedy(street: Path, ingest: Run, tmp_path: Path) -> None:
    (street / "classes.json").write_text('{"classes": ["road", "car"]}')
    with pytest.raises(SourceError) as caught:
        ingest(source=street, layout="masks")
    said = str(caught.value)
    assert "has no usable image (layout masks, 2 listed)" in said
    assert "images/train/0.jpg: its mask has the value 7, 26, outside the 2 classes" in said
    assert "label_map: {7: road" in said
    (place,) = [word.rstrip(",.") for word in said.replace(" (a label", " ").split() if word.endswith("problems.txt")]
    lines = Path(place).read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == ["images/train/0.jpg", "images/val/1.jpg"]


def test_ids_without_any_names_are_no_classes(tmp_path: Path, ingest: Run, make_image: Make) -> None:
    make_image(tmp_path / "in/images/x.jpg", 4, 3)
    (tmp_path / "in/masks").mkdir()
    ids = np.array([[7, 26001, 26002, 0]] * 3, np.uint16)
    (tmp_path / "in/masks/x.png").write_bytes(encode(Image.fromarray(ids), "PNG"))
    with pytest.raises(SourceError, match=r"4 values up to 26002, without names: they look like ids.*label_map"):
        ingest(source=tmp_path / "in", layout="masks")
