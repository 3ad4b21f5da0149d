"""`configs/prepare_open_images.py` on tiny files of Open Images' form: which images it takes, and what it says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from configs.prepare_open_images import SAME_CLASSES, main, read_limits

TITLES = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
NAMES = {"/m/1": "Man", "/m/2": "Woman", "/m/3": "Cattle", "/m/4": "Fedora", "/m/5": "Kitchen & dining room table"}
IMAGES = {
    "hat": ["/m/4"],  # no class of COCO
    "crowd": ["/m/1", "/m/1", "/m/2", "/m/2"],  # four of at most three persons
    "pair": ["/m/1", "/m/2", "/m/4"],
    "lone": ["/m/1"],
    "other": ["/m/2", "/m/2"],  # with `pair` and `lone`, five persons
    "herd": ["/m/3", "/m/3"],
    "table": ["/m/5", "/m/4"],  # COCO has none of its class: no room
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "open_images"
    folder.mkdir()
    lines = [
        f"{image},xclick,{label},1,0.1,0.9,0.1,0.9,0,0,0,0,0" for image, labels in IMAGES.items() for label in labels
    ]
    (folder / "oidv6-train-annotations-bbox.csv").write_text("\n".join([TITLES, *lines]) + "\n")
    (folder / "class-descriptions-boxable.csv").write_text("".join(f"{k},{v}\n" for k, v in NAMES.items()))
    names = ["person", "cow", "dining table", "spaceship"]
    objects = [{"category_id": number} for number, count in ((1, 3), (2, 2)) for _ in range(count)]
    content = {"categories": [{"id": n, "name": name} for n, name in enumerate(names, 1)], "annotations": objects}
    (tmp_path / "coco.json").write_text(json.dumps(content))
    return tmp_path


def call(place: Path, *more: str) -> int:
    to = str(place / "mini")
    return main(["--open-images", str(place / "open_images"), "--coco", str(place / "coco.json"), "--to", to, *more])


def listed(place: Path) -> list[str]:
    lines = (place / "mini" / "images.txt").read_text().splitlines()
    assert all(line.startswith("train/") for line in lines)
    return [line.removeprefix("train/") for line in lines]


@pytest.mark.parametrize("seed", range(6))
def test_takes_images_of_shared_classes_up_to_their_number_in_coco(seed: int, place: Path) -> None:
    assert call(place, "--seed", str(seed)) == 0
    images = listed(place)
    assert images == sorted(set(images))
    labels = Counter(label for image in images for label in IMAGES[image])
    assert labels["/m/1"] + labels["/m/2"] <= 3
    assert "herd" in images
    assert not {"hat", "crowd", "table"} & set(images)
    # Nothing that would still fit is left out.
    room = 3 - labels["/m/1"] - labels["/m/2"]
    left_out = {"pair": 2, "lone": 1, "other": 2}
    assert all(image in images or needed > room for image, needed in left_out.items())


def test_the_order_is_of_the_seed_and_not_of_the_table(place: Path) -> None:
    assert call(place) == 0
    first = listed(place)
    table = place / "open_images" / "oidv6-train-annotations-bbox.csv"
    titles, *lines = table.read_text().splitlines()
    table.write_text("\n".join([titles, *reversed(lines)]) + "\n")
    assert call(place) == 0
    assert listed(place) == first
    chosen = set()
    for seed in range(20):
        assert call(place, "--seed", str(seed)) == 0
        chosen.add(tuple(listed(place)))
    assert len(chosen) > 1


def test_count_limits_the_set_and_its_statistics_are_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(place, "--count", "1") == 0
    [image] = listed(place)
    said = capsys.readouterr().out
    assert f"1 images, {len(IMAGES[image]):.1f} objects" in said
    assert f"{len(set(IMAGES[image]))} classes (paper" in said
    assert "does not have: spaceship" in said


def test_photographs_are_copied_and_missing_ones_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for image in IMAGES:
        if image != "herd":
            path = place / "photographs" / "deep" / f"{image}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image.encode())
    assert call(place, "--photographs", str(place / "photographs")) == 1
    assert "lacks 1 photographs: herd" in capsys.readouterr().out
    (place / "photographs" / "herd.jpg").write_bytes(b"herd")
    assert call(place, "--photographs", str(place / "photographs")) == 0
    assert "complete" in capsys.readouterr().out
    copied = {path.name: path.read_bytes() for path in (place / "mini" / "train").iterdir()}
    assert copied == {f"{image}.jpg": image.encode() for image in listed(place)}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("open_images/oidv6-train-annotations-bbox.csv", "image,label\na,b\n", "ImageID"),
        ("open_images/class-descriptions-boxable.csv", "", "not Open Images' list of classes"),
        ("open_images/v7-class-descriptions-boxable.csv", "/m/1,Man\n", "must have one file"),
        ("coco.json", "{}", "not COCO's instances_train2017.json"),
    ],
)
def test_a_file_of_another_form_is_named(
    file: str, content: str, message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / file).write_text(content)
    assert call(place) == 2
    assert message in capsys.readouterr().err


def test_a_table_without_shared_classes_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = place / "open_images" / "oidv6-train-annotations-bbox.csv"
    titles, *lines = table.read_text().splitlines()
    table.write_text("\n".join([titles, *(line for line in lines if "/m/4" in line and "hat" in line)]) + "\n")
    assert call(place) == 2
    assert "none of 1 images has an object of a class of COCO" in capsys.readouterr().err


def test_the_other_names_are_of_classes_of_coco(quickstart_data: Path) -> None:
    names = set(read_limits(quickstart_data / "instances_val.json"))
    assert len(names) == 80
    assert set(SAME_CLASSES) <= names
