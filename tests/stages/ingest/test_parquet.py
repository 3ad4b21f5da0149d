"""Layout `parquet`: plain bytes and Hugging Face's struct, labels as numbers and names, masks, splits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import SourceError
from stages.data.images import encode_mask
from tests.conftest import encode, smooth_pixels
from tests.stages.ingest.conftest import Ingested

Run = Callable[..., Ingested]
IMAGES = [encode(smooth_pixels(8, 6, seed), "JPEG") for seed in range(5)]


def write(file: Path, columns: dict[str, Any], metadata: dict[str, Any] | None = None, row_group_size: int = 2) -> Path:
    table = pa.table(columns)
    if metadata:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=row_group_size)
    return file


def test_plain_bytes_in_one_file(tmp_path: Path, ingest: Run) -> None:
    file = write(tmp_path / "set.parquet", {"image": IMAGES, "label": ["b", "a", None, "a", "b"]})
    done = ingest(source=file, layout="parquet", shard_rows=2)
    assert [row["image"] for row in done.rows] == IMAGES
    assert [row["key"] for row in done.rows][:2] == ["set.parquet#00000000", "set.parquet#00000001"]
    assert [row["label_id"] for row in done.rows] == [1, 0, None, 0, 1]
    assert done.outcome.notes["classes"] == ["a", "b"]


def test_hugging_face(tmp_path: Path, ingest: Run) -> None:
    structs = [{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(IMAGES)]
    features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    write(tmp_path / "hf/data/train-00000-of-00001.parquet", {"image": structs[:3], "label": [1, 0, 1]}, features)
    write(tmp_path / "hf/data/test-00000-of-00001.parquet", {"image": structs[3:], "label": [-1, 9]}, features)
    done = ingest(source=tmp_path / "hf", layout="parquet")
    found = {row["key"].split("/")[-1]: (row["split"], row["label"], row["label_id"]) for row in done.rows}
    assert found == {
        "3.jpg": ("test", None, None),  # -1: a hidden label
        "0.jpg": ("train", "dog", 1),
        "1.jpg": ("train", "cat", 0),
        "2.jpg": ("train", "dog", 1),
    }
    assert list(done.reasons.values()) == ["label 9 is outside the 2 classes"]


def test_numbers_without_names(tmp_path: Path, ingest: Run) -> None:
    file = write(tmp_path / "set.parquet", {"img": IMAGES[:2], "y": [2, 0]})
    done = ingest(source=file, layout="parquet", columns={"image": "img", "label": "y"})
    assert [(row["label"], row["label_id"]) for row in done.rows] == [("2", 2), ("0", 0)]


def test_masks_and_splits_in_columns(tmp_path: Path, ingest: Run) -> None:
    masks = [encode_mask(np.full((6, 8), value, np.uint8)) for value in (0, 1, 255)]
    columns = {"image": IMAGES[:4], "annotation": [{"bytes": m} for m in [*masks, b""]], "part": ["a", "b", "a", "a"]}
    file = write(tmp_path / "set.parquet", columns)
    names = {"mask": "annotation", "split": "part"}
    done = ingest(source=file, layout="parquet", columns=names, classes=["sky", "road"])
    assert [row["mask"] for row in done.rows] == masks
    assert [row["split"] for row in done.rows] == ["a", "b", "a"]
    assert len(done.outcome.problems) == 1


def test_unusable_rows_are_named(tmp_path: Path, ingest: Run) -> None:
    cells = [{"bytes": IMAGES[0], "path": None}, {"bytes": None, "path": "far/away.jpg"}, None]
    cells.append({"bytes": IMAGES[1][:200], "path": "half.jpg"})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    file = write(tmp_path / "set.parquet", {"image": pa.array(cells, kind)})
    done = ingest(source=file, layout="parquet")
    assert [row["key"] for row in done.rows] == ["set.parquet#00000000"]
    reasons = done.reasons
    assert "only a path (far/away.jpg)" in reasons["set.parquet#00000001/far/away.jpg"]
    assert reasons["set.parquet#00000002"] == "the file is empty"
    assert "set.parquet#00000003/half.jpg" in reasons


def test_wrong_columns_and_files(tmp_path: Path, ingest: Run) -> None:
    file = write(tmp_path / "set.parquet", {"picture": IMAGES})
    with pytest.raises(SourceError, match=r"has no column image \(it has picture; set `columns`\)"):
        ingest(source=file, layout="parquet")
    file = write(tmp_path / "other.parquet", {"image": IMAGES})
    with pytest.raises(SourceError, match="has no column klass"):
        ingest(source=file, layout="parquet", columns={"label": "klass"})
    file.write_bytes(b"PAR1 and nothing more")
    with pytest.raises(SourceError, match="not a readable Parquet file"):
        ingest(source=file, layout="parquet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/readme.md").write_text("x")
    with pytest.raises(SourceError, match="not of layout parquet"):
        ingest(source=tmp_path / "empty", layout="parquet")
