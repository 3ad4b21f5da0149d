"""What ingest says of a source that it could read: splits, links, names, files that lose something, labels."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import SourceError
from tests.conftest import encode, smooth_pixels
from tests.stages.ingest.conftest import Ingested

Run = Callable[..., Ingested]
Make = Callable[..., Path]


def test_folders_named_after_splits_that_are_none(tmp_path: Path, ingest: Run, make_image: Make) -> None:
    for path in ("train/cat/1.jpg", "val/cat/2.jpg", "val/dog/3.jpg", "demo.jpg"):
        make_image(tmp_path / "in" / path)
    done = ingest(source=tmp_path / "in")
    assert (
        "2 images in a folder val count as split train: not all folders beside those are called after a split "
        "(name the splits' folders with `splits`)"
    ) in done.said
    chosen = ingest(source=tmp_path / "in", splits=["train", "val"])
    assert [row["split"] for row in chosen.rows] == ["train", "val", "val"]
    assert not [line for line in chosen.said if "count as split" in line]


def test_splits_before_the_image_and_mask_folders(
    tmp_path: Path, ingest: Run, make_image: Make, make_mask: Make
) -> None:
    for number, split in enumerate(("train", "valid", "extra")):
        make_image(tmp_path / f"in/{split}/images/{number}.jpg", 4, 3)
        make_mask(tmp_path / f"in/{split}/masks/{number}.png", np.array([[0, 1, 1, 0]] * 3, np.uint8))
    done = ingest(source=tmp_path / "in", layout="masks")
    assert [(row["key"], row["split"]) for row in done.rows] == [
        ("train/images/0.jpg", "train"),
        ("valid/images/1.jpg", "val"),
    ]
    named = ingest(source=tmp_path / "in", layout="masks", splits={"train": "train", "test": "extra"})
    assert [row["split"] for row in named.rows] == ["test", "train"]


def test_links_out_of_the_source_are_read_and_said(tmp_path: Path, ingest: Run, make_image: Make) -> None:
    elsewhere = make_image(tmp_path / "elsewhere/a.jpg")
    make_image(tmp_path / "in/b.jpg")
    (tmp_path / "in/a.jpg").symlink_to(elsewhere)
    (tmp_path / "in/c.jpg").symlink_to("b.jpg")
    done = ingest(source=tmp_path / "in")
    assert len(done.rows) == 3
    assert f"1 link out of the source, read as part of it: a.jpg -> {elsewhere}" in done.said


def test_a_name_that_is_not_utf8_is_named(tmp_path: Path, ingest: Run, make_image: Make) -> None:
    data = make_image(tmp_path / "in/a.jpg").read_bytes()
    with open(os.fsencode(tmp_path / "in") + b"/caf\xe9.jpg", "wb") as file:
        file.write(data)
    done = ingest(source=tmp_path / "in")
    assert [row["key"] for row in done.rows] == ["a.jpg"]
    assert done.reasons == {"caf\\xe9.jpg": "its name is not UTF-8: rename it"}
    with pytest.raises(SourceError, match="on_error: fail stops here"):
        ingest(source=tmp_path / "in", on_error="fail")


def test_files_of_every_kind(tmp_path: Path, ingest: Run, make_image: Make) -> None:
    folder = tmp_path / "in"
    photograph = Image.fromarray(smooth_pixels(32, 24))
    make_image(folder / "good.jpg")
    files = {
        "cmyk.jpg": encode(photograph.convert("CMYK")),
        "deep.png": encode(Image.fromarray(np.full((24, 32), 40_000, np.uint16)), "PNG"),
        "moving.png": encode(photograph, "PNG", save_all=True, append_images=[photograph.rotate(90)]),
        "moving.webp": encode(photograph, "WEBP", save_all=True, append_images=[photograph.rotate(90)]),
        "png.jpg": encode(photograph, "PNG"),
        "phone.heic": b"\0\0\0\x18ftypheic",
        "phone.jpg": b"\0\0\0\x18ftypheic\0\0\0\0mif1",
        "scan.jpg": encode(photograph, "TIFF"),
        "moving.jpg": encode(photograph, "GIF"),
        "text.jpg": b"<html>not found</html>",
        "cut.jpg": encode(photograph)[:-80],
        "empty.jpg": b"",
        "old.jfif": encode(photograph),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    done = ingest(source=folder)
    assert [row["key"] for row in done.rows] == [
        "cmyk.jpg", "deep.png", "good.jpg", "moving.png", "moving.webp", "png.jpg",
    ]  # fmt: skip
    assert done.reasons.keys() == {
        "phone.heic", "phone.jpg", "scan.jpg", "moving.jpg", "text.jpg", "cut.jpg", "empty.jpg", "old.jfif",
    }  # fmt: skip
    for name, words in (("phone.jpg", "a HEIC file"), ("scan.jpg", "a TIFF file"), ("moving.jpg", "a GIF file")):
        assert done.reasons[name] == f"{words}, which is not read: convert it to JPEG, PNG, WebP or BMP"
    assert done.reasons["old.jfif"] == "not an ending that is read: rename it to .jpg"
    assert done.outcome.counts["problems"] == 8
    said = "\n".join(done.said)
    assert "1 image kept as found, and read with a loss: CMYK, converted without its colour profile (cmyk.jpg)" in said
    assert "16 bits a channel, of which the high 8 count (deep.png)" in said
    assert "2 images kept as found, and read with a loss: an animation" in said
    assert done.outcome.notes["remarks"] == done.said[-3:]


def test_what_was_read_is_said(tmp_path: Path, ingest: Run, make_image: Make, make_mask: Make) -> None:
    for path in ("train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "train/d/1.jpg", "val/a/1.jpg"):
        make_image(tmp_path / "in" / path)
    assert ingest(source=tmp_path / "in").said[0] == (
        "read as layout folder: images by split: train 4, val 1; 4 classes of labels (a, b, c and 1 more)"
    )
    make_image(tmp_path / "pairs/images/1.jpg", 4, 3)
    make_mask(tmp_path / "pairs/masks/1.png", np.array([[0, 1, 1, 0]] * 3, np.uint8))
    (tmp_path / "pairs/classes.json").write_text('{"classes": ["sky", "road"]}')
    assert ingest(source=tmp_path / "pairs", layout="masks").said[0] == (
        "read as layout masks: images by split: train 1; 2 classes in masks (sky, road)"
    )


def test_labels_that_help_nobody(tmp_path: Path, ingest: Run, make_image: Make) -> None:
    for name in ("rose/1.jpg", "rose/2.jpg", "tulip/3.jpg"):
        make_image(tmp_path / "in/flowers" / name)
    assert (
        f"all labels are 'flowers' (are the classes one folder deeper? source: {tmp_path}/in/flowers)"
        in ingest(source=tmp_path / "in").said
    )
    said = ingest(source=tmp_path / "in/flowers").said
    assert said[1:] == ["1 class has one image only, which no k-NN can find by another: tulip"]


def test_one_image_is_said(tmp_path: Path, ingest: Run, make_image: Make) -> None:
    make_image(tmp_path / "in/a.jpg")
    done = ingest(source=tmp_path / "in")
    assert done.outcome.counts["images"] == 1
    assert done.said[1:] == ["the source has one image only"]


def test_system_files_alone_are_no_images(tmp_path: Path, ingest: Run) -> None:
    (tmp_path / "in/__MACOSX").mkdir(parents=True)
    (tmp_path / "in/__MACOSX/._a.jpg").write_bytes(b"x")
    (tmp_path / "in/.DS_Store").write_bytes(b"x")
    with pytest.raises(SourceError, match="is empty: no file in it, hidden ones aside"):
        ingest(source=tmp_path / "in")
    (tmp_path / "in/Thumbs.db").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"no file in it ends like an image \(there are: 1 \.db\)"):
        ingest(source=tmp_path / "in")


def test_a_picture_is_drawn_of_the_few_that_are_usable(tmp_path: Path, ingest: Run, make_image: Make) -> None:
    """One of 60 images can be used, and it is not among those that are spread over the set."""
    for number in range(60):
        (make_image if number == 7 else _broken)(tmp_path / f"in/{number:02d}.jpg")
    done = ingest(source=tmp_path / "in")
    assert done.outcome.counts["images"] == 1
    assert done.artifact.read("preview.png").startswith(b"\x89PNG")


def _broken(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"no image")
