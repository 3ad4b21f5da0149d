"""Layout `voc`: XML boxes counted from 1, palette masks, lists of splits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import SourceError
from stages.data.images import decode_mask
from tests.conftest import encode
from tests.stages.ingest.conftest import Ingested

Run = Callable[..., Ingested]
Make = Callable[..., Path]


def xml(*objects: str, width: int = 20) -> str:
    size = f"<size><width>{width}</width><height>10</height><depth>3</depth></size>"
    return f"<annotation>{size}{''.join(objects)}</annotation>"


def thing(name: str, box: tuple[int, ...] = (1, 1, 20, 10), difficult: int = 0) -> str:
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=False))
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox></object>"


@pytest.fixture
def voc(tmp_path: Path, make_image: Make) -> Path:
    """Three images: a (boxes and mask), b (boxes), c (neither)."""
    folder = tmp_path / "in"
    for name in "abc":
        make_image(folder / f"JPEGImages/{name}.jpg", 20, 10)
    for part in ("Annotations", "SegmentationClass", "ImageSets/Main", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True)
    (folder / "Annotations/a.xml").write_text(xml(thing("dog"), thing("person", (3, 4, 5, 6), 1)))
    (folder / "Annotations/b.xml").write_text(xml(thing("cat")))
    mask = Image.new("P", (20, 10), 12)
    mask.putpalette([i % 256 for i in range(768)])
    mask.putpixel((0, 0), 255)
    (folder / "SegmentationClass/a.png").write_bytes(encode(mask, "PNG"))
    (folder / "ImageSets/Main/train.txt").write_text("a\nc\n")
    (folder / "ImageSets/Main/val.txt").write_text("b\n")
    (folder / "ImageSets/Main/trainval.txt").write_text("a\nb\nc\n")
    (folder / "ImageSets/Main/dog_train.txt").write_text("a  1\nc -1\n")
    (folder / "ImageSets/Segmentation/train.txt").write_text("a\nb\nzzz\n")
    return folder


def test_boxes_and_masks(voc: Path, ingest: Run) -> None:
    done = ingest(source=voc, layout="voc", label="largest_object")
    a, b, c = done.rows
    assert [row["split"] for row in (a, b, c)] == ["train", "val", "train"]
    assert [row["label"] for row in (a, b, c)] == ["dog", "cat", None]
    assert a["objects"][0]["box"] == [0, 0, 20, 10]  # the whole image, counted from 1 with both ends
    assert a["objects"][1]["box"] == [2, 3, 5, 6]
    assert [entry["crowd"] for entry in a["objects"]] == [False, True]  # difficult
    values = decode_mask(a["mask"])
    assert np.unique(values).tolist() == [12, 255]
    assert done.outcome.notes["mask_classes"][12] == "dog"
    assert b["mask"] is None
    assert c["objects"] == []
    assert done.outcome.problems == []


def test_segmentation_set_needs_masks(voc: Path, ingest: Run) -> None:
    done = ingest(source=voc, layout="voc", image_set="Segmentation")
    assert [row["key"] for row in done.rows] == ["JPEGImages/a.jpg"]
    assert done.reasons == {
        "JPEGImages/b.jpg": "no mask SegmentationClass/b.png",
        "JPEGImages/zzz.jpg": "named in ImageSets/Segmentation, but not there",
    }


def test_bad_annotations(voc: Path, ingest: Run) -> None:
    (voc / "Annotations/a.xml").write_text(
        xml(thing("dog", (9, 9, 3, 3)), thing("dragon"), thing("cat", (1, 2)), thing("cow"))
    )
    (voc / "Annotations/b.xml").write_text(xml(width=999))
    (voc / "Annotations/c.xml").write_text('<!DOCTYPE a [<!ENTITY b "cc">]><annotation>&b;</annotation>')
    done = ingest(source=voc, layout="voc")
    (row,) = done.rows
    assert [entry["category"] for entry in row["objects"]] == ["cow"]
    assert done.outcome.counts["problems"] == 5
    assert "999x10 pixels, the image has 20x10" in done.reasons["JPEGImages/b.jpg"]
    assert "declares entities" in done.reasons["JPEGImages/c.jpg"]
    said = str(done.outcome.problems)
    assert "covers nothing" in said
    assert "'dragon' is not among the classes" in said
    assert "no box of four numbers" in said
    (voc / "Annotations/a.xml").write_text("<annotation>")
    with pytest.raises(SourceError, match=r"Annotations/a\.xml is not XML"):
        ingest(source=voc, layout="voc")


def test_without_lists_and_with_wrong_ones(voc: Path, ingest: Run, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no ImageSets/Layout \(there are: ImageSets/Main, ImageSets/Segmentation\)"):
        ingest(source=voc, layout="voc", image_set="Layout")
    (voc / "ImageSets").rename(tmp_path / "away")
    assert [row["split"] for row in ingest(source=voc, layout="voc", split="all").rows] == ["all"] * 3
    with pytest.raises(SourceError, match="not of layout voc"):
        ingest(source=tmp_path / "away", layout="voc")
