"""Layout `folder`, and what holds for every layout: keys, ids, bytes as found, problems by name."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.errors import SourceError
from stages.data.images import decode
from stages.ingest.settings import IngestConfig
from tests.stages.ingest.conftest import Ingested

Run = Callable[..., Ingested]
Make = Callable[..., Path]


def test_flat_folder(tmp_path: Path, ingest: Run, make_image: Make) -> None:
    for name in ("b.png", "a.jpg", "deep.webp", "Z.BMP"):
        make_image(tmp_path / "in" / name, width=30, height=20)
    done = ingest(source=tmp_path / "in")
    assert [(row["image_id"], row["key"]) for row in done.rows] == [
        (0, "Z.BMP"), (1, "a.jpg"), (2, "b.png"), (3, "deep.webp"),
    ]  # fmt: skip
    for row in done.rows:
        found = (tmp_path / "in" / row["key"]).read_bytes()
        assert row["image"] == found
        assert row["sha256"] == hashlib.sha256(found).hexdigest()
        assert (row["width"], row["height"], row["split"], row["label"]) == (30, 20, "train", None)
    assert done.outcome.counts["images"] == 4
    assert decode(done.artifact.read(done.outcome.preview)).shape[2] == 3


def test_classes_and_splits(tmp_path: Path, ingest: Run, make_image: Make) -> None:
    for path in ("train/dog/1.jpg", "train/cat/sub/2.jpg", "validation/dog/3.jpg", "test/4.jpg"):
        make_image(tmp_path / "in" / path)
    done = ingest(source=tmp_path / "in")
    assert done.outcome.notes["classes"] == ["cat", "dog"]
    found = {row["key"]: (row["split"], row["label"], row["label_id"]) for row in done.rows}
    assert found == {
        "test/4.jpg": ("test", None, None),
        "train/cat/sub/2.jpg": ("train", "cat", 0),
        "train/dog/1.jpg": ("train", "dog", 1),
        "validation/dog/3.jpg": ("val", "dog", 1),
    }
    assert done.outcome.notes["splits"] == {"test": 1, "train": 2, "val": 1}


def test_folders_that_are_not_all_splits_are_classes(tmp_path: Path, ingest: Run, make_image: Make) -> None:
    make_image(tmp_path / "in/train/1.jpg")  # a class of trains, beside another
    make_image(tmp_path / "in/bus/1.jpg")
    assert {row["label"] for row in ingest(source=tmp_path / "in").rows} == {"train", "bus"}


def test_chosen_splits(tmp_path: Path, ingest: Run, make_image: Make) -> None:
    for path in ("part1/a/1.jpg", "part2/a/2.jpg", "rest/a/3.jpg"):
        make_image(tmp_path / "in" / path)
    done = ingest(source=tmp_path / "in", splits={"train": "part1", "val": "part2"})
    assert [(row["split"], row["label"]) for row in done.rows] == [("train", "a"), ("val", "a")]
    with pytest.raises(SourceError, match=r"no folder nowhere for `splits` \(there are: part1, part2, rest\)"):
        ingest(source=tmp_path / "in", splits=["nowhere"])


def test_classes_in_the_order_of_the_config(tmp_path: Path, ingest: Run, make_image: Make) -> None:
    make_image(tmp_path / "in/dog/1.jpg")
    make_image(tmp_path / "in/cow/1.jpg")
    done = ingest(source=tmp_path / "in", classes=["dog", "cat"])
    assert [(row["label"], row["label_id"]) for row in done.rows] == [("dog", 0)]
    assert "label 'cow' is not among the classes" in done.reasons["cow/1.jpg"]


def test_unreadable_files_are_named_and_ids_have_no_gap(tmp_path: Path, ingest: Run, make_image: Make) -> None:
    folder = tmp_path / "in"
    for i in range(6):
        make_image(folder / f"{i}.jpg")
    (folder / "1.jpg").write_bytes((folder / "1.jpg").read_bytes()[:-60])
    (folder / "3.jpg").write_bytes(b"")
    (folder / "5.jpg").unlink()
    (folder / "5.jpg").symlink_to(folder / "gone.jpg")
    make_image(folder / "huge.png", width=300, height=200)
    (folder / "scan.tiff").write_bytes(b"II*\0")
    (folder / "notes.txt").write_text("not an image, and not meant to be one")
    (folder / ".hidden.jpg").write_bytes(b"")
    done = ingest(source=folder, max_pixels=50_000, shard_rows=2)
    assert [(row["image_id"], row["key"]) for row in done.rows] == [(0, "0.jpg"), (1, "2.jpg"), (2, "4.jpg")]
    assert set(done.reasons) == {"1.jpg", "3.jpg", "5.jpg", "huge.png", "scan.tiff"}
    assert "truncated" in done.reasons["1.jpg"]
    assert done.reasons["3.jpg"] == "the file is empty"
    assert "No such file" in done.reasons["5.jpg"]
    assert "300x200 pixels are more than the limit of 50000" in done.reasons["huge.png"]
    assert "convert it" in done.reasons["scan.tiff"]
    assert done.outcome.counts | {"images": 3, "skipped": 4, "problems": 5} == done.outcome.counts
    assert done.artifact.manifest.problems == done.outcome.problems
    assert any("1.jpg" in line for line in done.said)


def test_on_error_fail_names_the_first(tmp_path: Path, ingest: Run, make_image: Make) -> None:
    make_image(tmp_path / "in/a.jpg")
    (tmp_path / "in/b.jpg").write_bytes(b"nothing like a photograph")
    with pytest.raises(SourceError, match=r"b\.jpg: not an image of a known format.*on_error: skip"):
        ingest(source=tmp_path / "in", on_error="fail")


def test_sources_without_images(tmp_path: Path, ingest: Run, make_image: Make) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        ingest(source=tmp_path / "nowhere")
    (tmp_path / "in").mkdir()
    with pytest.raises(SourceError, match="is empty"):
        ingest(source=tmp_path / "in")
    (tmp_path / "in/readme.txt").write_text("x")
    with pytest.raises(SourceError, match=r"has no image: no file in it ends like an image \(there are: 1 \.txt\)"):
        ingest(source=tmp_path / "in")
    (tmp_path / "in/a.jpg").write_text("x")
    with pytest.raises(SourceError, match=r"no usable image .*1 listed.*a\.jpg: not an image"):
        ingest(source=tmp_path / "in")
    with pytest.raises(SourceError, match="is a file"):
        ingest(source=tmp_path / "in/a.jpg")


def test_links_are_followed_once(tmp_path: Path, ingest: Run, make_image: Make) -> None:
    make_image(tmp_path / "elsewhere/a.jpg")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/cats").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "elsewhere")
    assert [row["key"] for row in ingest(source=tmp_path / "in").rows] == ["cats/a.jpg"]


def test_limit_spreads_over_the_classes(tmp_path: Path, ingest: Run, make_image: Make) -> None:
    for name in ("a", "b", "c", "d"):
        for i in range(5):
            make_image(tmp_path / "in" / name / f"{i}.jpg")
    done = ingest(source=tmp_path / "in", limit=4)
    assert [row["label"] for row in done.rows] == ["a", "b", "c", "d"]


def test_planning_imports_nothing_heavy() -> None:
    heavy = {"cv2", "numpy", "obstore", "PIL", "pyarrow", "ray"}
    code = f"import sys, stages.ingest.stage; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_layouts_fields_are_mistakes() -> None:
    with pytest.raises(ValidationError, match="annotations is for layout coco, this is folder"):
        IngestConfig(source="x", annotations="a.json")
    with pytest.raises(ValidationError, match="largest_object needs a layout with objects"):
        IngestConfig(source="x", layout="masks", label="largest_object")


@pytest.mark.data
def test_objects_of_the_development_data(dev_data: Path, ingest: Run) -> None:
    done = ingest(source=dev_data / "objects", limit=60)
    assert done.outcome.counts["images"] == 60
    assert done.outcome.problems == []
    assert len(done.outcome.notes["classes"]) == 10
    assert done.outcome.notes["splits"] == {"train": 50, "val": 10}
