"""Layout `davis`: sequences, frames, binary and palette masks, both forms of lists."""

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


@pytest.fixture
def davis(tmp_path: Path, make_image: Make, make_mask: Make) -> Path:
    folder = tmp_path / "in"
    for sequence in ("swan", "dog"):
        for frame in range(2):
            make_image(folder / f"JPEGImages/480p/{sequence}/{frame:05d}.jpg", 6, 4)
            values = np.zeros((4, 6), np.uint8)
            values[0, : frame + 1] = 255
            make_mask(folder / f"Annotations/480p/{sequence}/{frame:05d}.png", values)
    return folder


def listed(folder: Path, year: str, **lists: str) -> None:
    for name, text in lists.items():
        file = folder / "ImageSets" / year / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_binary_masks(davis: Path, ingest: Run) -> None:
    done = ingest(source=davis, layout="davis")
    assert [(row["sequence"], row["frame"]) for row in done.rows] == [("dog", 0), ("dog", 1), ("swan", 0), ("swan", 1)]
    assert done.outcome.notes["mask_classes"] == ["background", "object"]
    assert done.said[1:] == ["no lists in ImageSets: every image is of split train (set split, or write the lists)"]
    assert decode_mask(done.rows[1]["mask"])[0].tolist() == [1, 1, 0, 0, 0, 0]


def test_lists_of_both_years(davis: Path, ingest: Run) -> None:
    line = "/JPEGImages/480p/swan/0000{0}.jpg /Annotations/480p/swan/0000{0}.png\n"
    listed(davis, "480p", val=line.format(0) + line.format(1))
    assert {row["sequence"]: row["split"] for row in ingest(source=davis, layout="davis").rows} == {"swan": "val"}
    listed(davis, "2017", train="swan\n", val="dog\n")
    by_name = {row["sequence"]: row["split"] for row in ingest(source=davis, layout="davis").rows}
    assert by_name == {"swan": "train", "dog": "val"}
    assert len(ingest(source=davis, layout="davis", image_set="480p", splits=["val"]).rows) == 2


def test_palette_masks_number_objects(davis: Path, ingest: Run) -> None:
    mask = Image.new("P", (6, 4), 0)
    mask.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
    mask.putpixel((0, 0), 3)
    for path in davis.glob("Annotations/480p/*/*.png"):
        path.write_bytes(encode(mask, "PNG"))
    done = ingest(source=davis, layout="davis")
    assert decode_mask(done.rows[0]["mask"]).max() == 3
    assert done.outcome.notes["mask_classes"] == ["0", "1", "2", "3"]


def test_frames_without_a_mask_are_kept(davis: Path, ingest: Run) -> None:
    (davis / "Annotations/480p/dog/00001.png").unlink()
    done = ingest(source=davis, layout="davis")
    assert [row["mask"] is None for row in done.rows] == [False, True, False, False]
    assert done.outcome.notes["without_mask"] == 1


def test_wrong_folders(davis: Path, ingest: Run, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no images in JPEGImages/1080p \(there are: 480p"):
        ingest(source=davis, layout="davis", resolution="1080p")


@pytest.mark.data
def test_video_of_the_development_data(dev_data: Path, ingest: Run) -> None:
    done = ingest(source=dev_data / "video", layout="davis", limit=18)
    assert done.outcome.problems == []
    assert {row["sequence"] for row in done.rows} == {
        "blackswan", "car-shadow", "dog", "horsejump-high", "libby", "motocross-jump",
    }  # fmt: skip
    assert {row["split"] for row in done.rows} == {"val"}
    assert all(set(np.unique(decode_mask(row["mask"]))) <= {0, 1} for row in done.rows)
