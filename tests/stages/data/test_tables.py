"""Random access through the mapped copy, and the packing of superpixel maps."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.errors import ArtifactDamaged, StoreError
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data import tables
from stages.data.rows import read_shard
from stages.data.tables import SCHEMAS, Table, pack_labels, unpack_labels


def boxes_artifact(store: ArtifactStore, ids: list[list[int]], fingerprint: str = "aaaaaaaaaaaa") -> Artifact:
    """Image i has i % 4 boxes, all of whose numbers are i."""
    writer = store.begin("boxes", fingerprint)
    for index, shard in enumerate(ids):
        rows = [{"image_id": i, "boxes": [[float(i)] * 4] * (i % 4)} for i in shard]
        writer.put_table(index, pa.Table.from_pylist(rows, schema=SCHEMAS["boxes"]))
    return writer.commit()


def test_rows_are_found_by_id_across_shards_and_batches(store: ArtifactStore) -> None:
    artifact = boxes_artifact(store, [list(range(200)), list(range(200, 230)), []])
    table = Table.open(artifact)
    assert len(table) == 230
    assert table.ids.tolist() == list(range(230))
    for image_id in (0, 63, 64, 199, 200, 229):
        row = table.row(image_id)
        assert row["image_id"] == image_id
        assert row["boxes"].shape == (image_id % 4, 4)
        assert row["boxes"].dtype == np.float32
        assert (row["boxes"] == image_id).all()
    assert table.take([229, 3, 3]).column("image_id").to_pylist() == [229, 3, 3]


def test_rows_are_right_when_more_batches_are_read_than_are_kept_open(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_KEPT_BATCHES", 2)
    table = Table.open(boxes_artifact(store, [list(range(200)), list(range(200, 430))]))
    for image_id in (0, 429, 100, 63, 64, 300, 0, 200):
        assert (table.row(image_id)["boxes"] == image_id).all()
        assert len(table._batches) <= 2


@given(st.sets(st.integers(0, 400), min_size=1, max_size=60))
def test_ids_with_gaps(tmp_path_factory: pytest.TempPathFactory, ids: set[int]) -> None:
    store = ArtifactStore(str(tmp_path_factory.mktemp("s")))
    ordered = sorted(ids)
    table = Table.open(boxes_artifact(store, [ordered[:20], ordered[20:]]))
    for image_id in range(-1, 402):
        assert (image_id in table) == (image_id in ids)
    assert [table.row(image_id)["image_id"] for image_id in ordered] == ordered
    with pytest.raises(KeyError, match="image_id 401 is not in boxes/aaaaaaaaaaaa"):
        table.row(401)


def test_columns(store: ArtifactStore) -> None:
    writer = store.begin("neighbors", "bbbbbbbbbbbb")
    rows = [{"image_id": i, "neighbors": [i + 1, i + 2], "similarities": [0.5, 0.25]} for i in range(100)]
    for index in range(2):
        writer.put_table(index, pa.Table.from_pylist(rows[index * 50 : index * 50 + 50], schema=SCHEMAS["neighbors"]))
    artifact = writer.commit()
    neighbors = Table.open(artifact, ["neighbors"]).column("neighbors")
    assert neighbors.shape == (100, 2)
    assert neighbors[70].tolist() == [71, 72]
    assert Table.open(artifact, ["neighbors"]).schema.names == ["image_id", "neighbors"]
    row = Table.open(artifact).row(7)
    assert row["neighbors"].tolist() == [8, 9]
    with pytest.raises(StoreError, match="no column colour: it has image_id, neighbors, similarities"):
        Table.open(artifact, ["colour"])


def test_nulls_stay_nulls(store: ArtifactStore, images: Callable[..., Artifact]) -> None:
    artifact = images({"a.jpg": b"1", "b.jpg": b"2"})
    row = Table.open(artifact, ["image", "label", "objects", "mask"]).row(1)
    assert row == {"image_id": 1, "image": b"2", "label": None, "objects": None, "mask": None}


def test_pickles_to_another_process(store: ArtifactStore) -> None:
    table = Table.open(boxes_artifact(store, [list(range(9))]), ["boxes"])
    again = pickle.loads(pickle.dumps(table))
    assert again.row(5)["boxes"].tolist() == table.row(5)["boxes"].tolist()
    assert len(pickle.dumps(table)) < 20_000  # the way to the rows, not the rows


def _open_and_sum(artifact: Artifact) -> float:
    table = Table.open(artifact)
    return float(sum(table.row(int(i))["boxes"].sum() for i in table.ids))


def test_processes_that_open_together_make_one_copy(store: ArtifactStore) -> None:
    artifact = boxes_artifact(store, [list(range(300))], "cccccccccccc")
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        sums = pool.map(_open_and_sum, [artifact] * 4)
    assert len(set(sums)) == 1
    copies = [path for path in (artifact.cache / "tables").iterdir() if "cccccccccccc" in path.name]
    assert sorted(path.suffix for path in copies) == ["", ".lock"]


def _copy(artifact: Artifact) -> Path:
    [folder] = (artifact.cache / "tables").glob(f"boxes-{artifact.fingerprint}-*[!k]")
    return folder


def test_a_broken_copy_is_made_again(store: ArtifactStore) -> None:
    artifact = boxes_artifact(store, [list(range(50))], "dddddddddddd")
    Table.open(artifact)
    with (_copy(artifact) / "table.arrow").open("r+b") as file:
        file.truncate(1000)
    assert Table.open(artifact).row(49)["image_id"] == 49
    (_copy(artifact) / "whole.json").unlink()  # as if the builder had been killed
    assert Table.open(artifact).row(49)["image_id"] == 49


def test_what_a_killed_builder_left_is_removed(store: ArtifactStore) -> None:
    artifact = boxes_artifact(store, [list(range(50))], "eeeeeeeeeeee")
    Table.open(artifact)
    folder = _copy(artifact)
    left = folder.with_name(f"{folder.name}.0badf00d.tmp")
    folder.rename(left)
    assert Table.open(artifact).row(49)["image_id"] == 49
    assert not left.exists()


def test_a_recomputed_artifact_never_meets_the_old_copy(tmp_path: Path) -> None:
    first = boxes_artifact(ArtifactStore(str(tmp_path / "1")), [[0, 1, 2]], "ffffffffffff")
    second = boxes_artifact(ArtifactStore(str(tmp_path / "2")), [[0, 1]], "ffffffffffff")
    assert (len(Table.open(first)), len(Table.open(second))) == (3, 2)


def test_a_flipped_byte_is_found_before_a_copy_is_made(store: ArtifactStore) -> None:
    artifact = boxes_artifact(store, [list(range(50))], "abababababab")
    [entry] = artifact.shards()
    path = Path(artifact.address) / entry.stored
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    with pytest.raises(ArtifactDamaged, match=entry.stored):
        Table.open(artifact)
    with pytest.raises(ArtifactDamaged, match=entry.stored):
        read_shard(artifact, entry)


def test_ids_must_rise(store: ArtifactStore) -> None:
    with pytest.raises(StoreError, match="image_id must rise"):
        Table.open(boxes_artifact(store, [[3, 4], [4, 5]], "cdcdcdcdcdcd"))


maps = hnp.arrays(np.uint16, hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=40))


@given(maps)
def test_labels_survive_packing(labels: np.ndarray) -> None:
    again = unpack_labels(pack_labels(labels))
    assert again.dtype == np.uint16
    assert again.shape == labels.shape
    assert (again == labels).all()


@given(st.integers(1, 2000), st.integers(0, 65535))
def test_long_runs_survive_packing(width: int, label: int) -> None:
    labels = np.full((3, width), label, np.uint16)
    labels[1, width // 2 :] = 0
    assert (unpack_labels(pack_labels(labels)) == labels).all()


def test_other_arrays_and_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="uint16"):
        pack_labels(np.zeros((2, 2), np.int32))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not a packed superpixel map"):
        unpack_labels(b"\x89PNG....")
