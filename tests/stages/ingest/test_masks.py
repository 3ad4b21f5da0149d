"""Layout `masks`: pairs of images and masks, and every way in which a pair can be wrong."""

from __future__ import annotations

import io
import json
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


def classes_json(folder: Path, **fields: object) -> None:
    text = {"classes": {"0": "sky", "1": "road"}, "ignore_index": 9} | fields
    (folder / "classes.json").write_text(json.dumps(text))


def test_pairs_with_and_without_splits(tmp_path: Path, ingest: Run, make_image: Make, make_mask: Make) -> None:
    values = np.array([[0, 1, 9, 1]] * 3, np.uint8)
    for base, split, expected in (("flat", "", "train"), ("split", "val/", "val")):
        make_image(tmp_path / base / "images" / f"{split}x.jpg", 4, 3)
        mask = make_mask(tmp_path / base / "masks" / f"{split}x.png", values)
        classes_json(tmp_path / base)
        done = ingest(source=tmp_path / base, layout="masks")
        (row,) = done.rows
        assert row["split"] == expected
        assert row["mask"] == mask.read_bytes()  # as found
        assert (decode_mask(row["mask"]) == values).all()
        assert done.outcome.notes["mask_classes"] == ["sky", "road"]
        assert done.outcome.notes["ignore_index"] == 9


def test_wrong_pairs_are_skipped_by_name(tmp_path: Path, ingest: Run, make_image: Make, make_mask: Make) -> None:
    good = np.zeros((3, 4), np.uint8)
    for name in ("good", "size", "value", "colour", "lost", "broken"):
        make_image(tmp_path / "in/images" / f"{name}.jpg", 4, 3)
        make_mask(tmp_path / "in/masks" / f"{name}.png", good)
    classes_json(tmp_path / "in")
    masks = tmp_path / "in/masks"
    make_mask(masks / "size.png", np.zeros((4, 3), np.uint8))
    make_mask(masks / "value.png", good + 7)
    (masks / "colour.png").write_bytes(encode(Image.new("RGB", (4, 3)), "PNG"))
    (masks / "broken.png").write_bytes((masks / "good.png").read_bytes()[:40])
    (masks / "lost.png").unlink()
    make_mask(masks / "orphan.png", good)
    done = ingest(source=tmp_path / "in", layout="masks")
    assert [row["key"] for row in done.rows] == ["images/good.jpg"]
    assert done.reasons.keys() == {f"images/{n}.jpg" for n in ("size", "value", "colour", "lost", "broken")} | {
        "masks/orphan.png"
    }
    assert "its mask has 3x4 pixels, the image has 4x3" in done.reasons["images/size.jpg"]
    assert "the value 7, outside the 2 classes and not the ignore_index 9" in done.reasons["images/value.jpg"]
    assert "mode RGB" in done.reasons["images/colour.jpg"]
    assert done.reasons["images/lost.jpg"] == "no mask masks/lost.png"
    assert done.reasons["masks/orphan.png"] == "a mask without an image"
    with pytest.raises(SourceError, match="on_error: fail"):
        ingest(source=tmp_path / "in", layout="masks", on_error="fail")


def test_palette_masks_become_indices(tmp_path: Path, ingest: Run, make_image: Make) -> None:
    palette = Image.new("P", (4, 3), 1)
    palette.putpalette([9, 9, 9, 0, 0, 255])
    make_image(tmp_path / "in/images/x.jpg", 4, 3)
    (tmp_path / "in/masks").mkdir()
    (tmp_path / "in/masks/x.png").write_bytes(encode(palette, "PNG"))
    (row,) = ingest(source=tmp_path / "in", layout="masks").rows
    stored = Image.open(io.BytesIO(row["mask"]))
    assert stored.mode == "L"
    assert np.asarray(stored).max() == 1


def test_values_without_names(tmp_path: Path, ingest: Run, make_image: Make, make_mask: Make) -> None:
    make_image(tmp_path / "in/images/x.jpg", 4, 3)
    make_mask(tmp_path / "in/masks/x.png", np.array([[0, 3, 255, 1]] * 3, np.uint8))
    done = ingest(source=tmp_path / "in", layout="masks")
    assert done.outcome.notes["mask_classes"] == ["0", "1", "2", "3"]
    assert done.outcome.notes["ignore_index"] == 255


def test_other_folder_names(tmp_path: Path, ingest: Run, make_image: Make, make_mask: Make) -> None:
    """Cityscapes names its files like this."""
    make_image(tmp_path / "in/leftImg8bit/train/bonn/b_1_leftImg8bit.png", 4, 3)
    for suffix in ("labelTrainIds", "color"):
        make_mask(tmp_path / f"in/gtFine/train/bonn/b_1_gtFine_{suffix}.png", np.ones((3, 4), np.uint8))
    names = {
        "image_folder": "leftImg8bit",
        "mask_folder": "gtFine",
        "image_suffix": "_leftImg8bit",
        "mask_suffix": "_gtFine_labelTrainIds",
    }
    done = ingest(source=tmp_path / "in", layout="masks", **names)
    assert [(row["split"], row["mask"] is not None) for row in done.rows] == [("train", True)]
    assert done.outcome.problems == []


def test_not_this_layout(tmp_path: Path, ingest: Run, make_image: Make, make_mask: Make) -> None:
    make_image(tmp_path / "in/a.jpg")
    with pytest.raises(SourceError, match="not of layout masks: it needs images in images/ and PNG masks in masks/"):
        ingest(source=tmp_path / "in", layout="masks")
    make_image(tmp_path / "bad/images/x.jpg", 4, 3)
    make_mask(tmp_path / "bad/masks/x.png", np.zeros((3, 4), np.uint8))
    (tmp_path / "bad/classes.json").write_text('{"klasses": []}')
    with pytest.raises(SourceError, match=r"classes\.json is not usable.*it needs"):
        ingest(source=tmp_path / "bad", layout="masks")


@pytest.mark.data
def test_scenes_of_the_development_data(dev_data: Path, ingest: Run) -> None:
    done = ingest(source=dev_data / "scenes", layout="masks", limit=24)
    assert done.outcome.problems == []
    assert done.outcome.counts["masks"] == 24
    assert done.outcome.notes["ignore_index"] == 11
    assert done.outcome.notes["mask_classes"][8] == "car"
    assert {row["split"] for row in done.rows} == {"train", "val"}
