"""The store's promises, each on a local folder and on S3 (a real server, over HTTP)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.errors import ArtifactDamaged, ArtifactMissing, StoreError
from pipeline.store.integrity import content_reason
from pipeline.store.manifest import FileEntry
from pipeline.store.objects import Objects
from pipeline.store.store import ArtifactStore
from pipeline.store.writer import ArtifactWriter
from tests.pipeline.store.conftest import flip, make, spoil, table


def test_an_artifact_comes_back_as_it_was_written(store: ArtifactStore) -> None:
    assert store.find("images", "abc") is None
    made = make(store)
    found = store.find("images", "abc")
    assert found == made
    assert found is not None
    assert found.rows == 30
    assert found.address == f"{store.address}/images/abc"
    assert [entry.name for entry in found.shards()] == [f"part-{i:05d}.parquet" for i in range(3)]
    assert [entry.rows for entry in found.shards()] == [10, 10, 10]
    assert found.manifest.columns == {"image_id": "int64", "key": "string"}
    assert found.manifest.stage == "scenes"
    assert found.manifest.preview is None
    assert math.isnan(found.manifest.metrics["loss"])
    assert found.manifest.created
    assert found.read("preview.png") == b"picture"
    assert found.bytes == sum(len(found.read(entry.name)) for entry in found.manifest.files)
    for index, entry in enumerate(found.shards()):
        path = found.local(entry.name)
        assert pq.read_table(path).equals(table(index))
        assert entry.sha256[:12] in entry.stored
        metadata = pq.read_metadata(path)
        assert metadata.row_group(0).column(0).compression == "ZSTD"
        assert metadata.row_group(0).column(0).statistics.min == index * 10
    assert [artifact.name for artifact in store.artifacts()] == ["images/abc"]
    with pytest.raises(ArtifactMissing, match=r"no file nothing.png \(it holds part-00000.parquet, "):
        found.file("nothing.png")


def test_nothing_is_left_beside_a_committed_artifact(store: ArtifactStore) -> None:
    writer = store.begin("images", "abc")
    (writer.progress_folder / "checkpoint").write_bytes(b"halfway")
    (writer.scratch / "notes").write_bytes(b"scribble")
    scratch, progress = writer.scratch, writer.progress_folder
    writer.put_file("a.bin", b"a first thought")
    writer.put_file("a.bin", b"a")
    artifact = writer.commit()
    held = {found.path for found in store.objects.walk("images")}
    assert held == {f"images/abc/{artifact.file('a.bin').stored}", "images/abc/manifest.json"}
    assert artifact.read("a.bin") == b"a"
    assert not scratch.exists()
    assert not progress.exists()


def test_nothing_is_readable_before_the_commit(store: ArtifactStore) -> None:
    writer = store.begin("images", "abc")
    writer.put_table(0, table(0))
    assert store.find("images", "abc") is None
    assert list(store.artifacts()) == []
    assert list(store.damaged()) == []


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("part-00001.parquet", flip, "its content differs from its checksum"),
        ("part-00002.parquet", lambda data: data[:-7], "bytes, the manifest says"),
        ("preview.png", None, "it is missing"),
    ],
)
def test_a_damaged_file_is_named_by_check_verify_and_reading(
    store: ArtifactStore, name: str, change: Callable[[bytes], bytes] | None, reason: str
) -> None:
    artifact = make(store)
    assert store.check(artifact) == store.verify(artifact) == []
    stored = spoil(artifact, name, change)
    for damages in (store.check(artifact), store.verify(artifact), store.check(artifact)):
        assert [(damage.artifact, damage.file) for damage in damages] == [("images/abc", stored)]
        assert reason in damages[0].reason
    with pytest.raises(ArtifactDamaged, match=stored):
        artifact.read(name)
    with pytest.raises(ArtifactDamaged, match=stored):
        artifact.local(name)


@pytest.mark.parametrize(
    "change",
    [
        flip,
        lambda data: data[:100],
        lambda data: b"",
        lambda data: b"[1, 2]",
        lambda data: data.replace(b"\n ", b"\n  ", 1),  # not even white space
        lambda data: data.replace(b'"scenes"', b'"scones"'),
    ],
)
def test_a_broken_manifest_is_named_and_never_believed(store: ArtifactStore, change: Callable[[bytes], bytes]) -> None:
    artifact = make(store)
    make(store, "other")
    spoil(artifact, "manifest.json", change)
    with pytest.raises(ArtifactDamaged, match=r"images/abc is damaged: manifest\.json: "):
        store.find("images", "abc")
    assert [(damage.artifact, damage.file) for damage in store.damaged()] == [("images/abc", "manifest.json")]
    assert [found.name for found in store.artifacts()] == ["images/other"]
    assert [damage.file for damage in store.verify(artifact)] == ["manifest.json"]


def test_a_manifest_in_another_artifacts_folder_is_not_believed(store: ArtifactStore) -> None:
    artifact = make(store)
    data = store.objects.get(f"{artifact.name}/manifest.json")
    assert data is not None
    store.objects.put("images/def/manifest.json", data)
    with pytest.raises(ArtifactDamaged, match="it belongs to images/abc"):
        store.find("images", "def")


def test_a_flip_within_one_tick_of_the_disks_clock_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.store.objects.file_tag", lambda stat: "the same tick")
    store = ArtifactStore(tmp_path)
    artifact = make(store)
    assert store.check(artifact) == []
    stored = spoil(artifact, "preview.png", flip)
    assert [damage.file for damage in store.check(artifact)] == [stored]


def test_a_check_reads_nothing_that_was_not_touched(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def counted(objects: Objects, path: str, entry: FileEntry) -> str:
        read.append(entry.name)
        return content_reason(objects, path, entry)

    monkeypatch.setattr("pipeline.store.integrity.content_reason", counted)
    for module in ("integrity", "writer"):  # files count as old enough for their tags to be trusted, without waiting
        monkeypatch.setattr(f"pipeline.store.{module}.GRAIN_NS", -(10**18))
    artifact = make(store)
    assert store.check(artifact) == []
    assert read == []  # what was just written needs no reading
    spoil(artifact, "preview.png", lambda data: data)  # written anew, the same
    assert store.check(artifact) == []
    assert store.check(artifact) == []
    bucket = store.address.startswith("s3://")  # its tags depend on the content only
    assert read == ([] if bucket else ["preview.png"])
    read.clear()
    store.objects.delete([f".tessera/memo/{artifact.name}.json"])
    assert store.check(artifact) == []
    assert store.check(artifact) == []
    assert len(read) == 4


def test_a_damaged_artifact_is_discarded_and_made_again(store: ArtifactStore) -> None:
    artifact = make(store)
    spoil(artifact, "part-00001.parquet", flip)
    store.discard("images", "abc")
    assert store.find("images", "abc") is None
    assert store.objects.walk("images") == []
    again = make(store)
    assert store.verify(again) == []
    assert again.read("part-00001.parquet")


def test_discarding_is_refused_while_another_process_computes(store: ArtifactStore) -> None:
    make(store)
    with store.lease("images", "abc"):
        store.discard("images", "abc")  # its own lease is no obstacle
        make(store)
        holder = store.lease("images", "abc").holder()
        assert holder is not None
        from pipeline.store import lease

        token = lease._HELD.pop((store.address, "images/abc"))  # as another process sees it
        with pytest.raises(StoreError, match="images/abc cannot be deleted: process"):
            store.discard("images", "abc")
        lease._HELD[store.address, "images/abc"] = token


def test_records_of_the_store(store: ArtifactStore) -> None:
    assert store.read_record("history/my pipeline") is None
    store.write_record("history/my pipeline", {"fingerprint": "abc", "loss": math.inf})
    store.write_record("history/other", {})
    assert store.read_record("history/my pipeline") == {"fingerprint": "abc", "loss": None}
    assert list(store.artifacts()) == []
    with pytest.raises(TypeError, match=r"history.thing: a object cannot be written as JSON"):
        store.write_record("history", {"thing": object()})


def test_the_manifest_is_plain_json(store: ArtifactStore) -> None:
    import numpy as np

    writer = store.begin("images", "abc")
    notes = {"recall": np.float32(0.5), "size": np.int64(3), "path": Path("a/b"), "nan": math.nan}
    artifact = writer.commit(notes=notes, problems=[{"key": "b.jpg", "reason": "no image"}])
    raw = json.loads(store.objects.get(f"{artifact.name}/manifest.json") or b"")
    assert raw["notes"] == {"recall": 0.5, "size": 3, "path": "a/b", "nan": None}
    assert raw["problems"] == [{"key": "b.jpg", "reason": "no image"}]
    with pytest.raises(TypeError, match="no field colour"):
        store.begin("images", "def").commit(colour="red")


@pytest.mark.parametrize("name", ["../up", "/root", "a/../b", "manifest.json", "", "a//b", "space in"])
def test_names_that_would_leave_the_folder_are_refused(store: ArtifactStore, name: str) -> None:
    writer = store.begin("images", "abc")
    with pytest.raises(ValueError, match="cannot name"):
        writer.put_file(name, b"")
    with pytest.raises(ValueError, match="cannot name"):
        store.find("images", "../abc")


def test_a_probe_leaves_nothing(store: ArtifactStore) -> None:
    store.probe_writable()
    assert store.objects.walk() == []


def test_writer_kind_and_addresses(store: ArtifactStore) -> None:
    writer = store.begin("encoder", "f00d")
    assert isinstance(writer, ArtifactWriter)
    assert (writer.kind, writer.fingerprint) == ("encoder", "f00d")
    assert writer.progress_address == f"{store.address}/encoder/f00d.progress"
    assert writer.progress_folder.is_dir()
    free = store.free_bytes()
    assert (free is None) == store.address.startswith("s3://")
    assert free is None or free > 0
