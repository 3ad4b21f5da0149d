"""The store's promises, each on a local folder and on S3 (a real server, over HTTP)."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ArtifactDamaged, ArtifactMissing, StoreError
from pipeline.store.artifact import Artifact
from pipeline.store.integrity import content_reason
from pipeline.store.lease import Holder, lease_path
from pipeline.store.manifest import FileEntry
from pipeline.store.objects import Objects
from pipeline.store.owner import Owner
from pipeline.store.store import ArtifactStore
from pipeline.store.writer import ArtifactWriter


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArtifactStore:
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "cache"))
    if request.param == "local":
        return ArtifactStore(tmp_path / "a store")
    return ArtifactStore(request.getfixturevalue("s3_address"))


def table(index: int, rows: int = 10) -> pa.Table:
    ids = list(range(index * rows, (index + 1) * rows))
    return pa.table({"image_id": pa.array(ids, pa.int64()), "key": [f"image {i}" for i in ids]})


def make(store: ArtifactStore, fingerprint: str = "abc", shards: int = 3) -> Artifact:
    writer = store.begin("images", fingerprint)
    for index in reversed(range(shards)):  # shards finish in any order
        writer.put_table(index, table(index))
    writer.put_file("preview.png", b"picture")
    return writer.commit(stage="scenes", uses="ingest", counts={"images": shards * 10}, metrics={"loss": math.nan})


def spoil(artifact: Artifact, name: str, change: Callable[[bytes], bytes] | None) -> str:
    """Change or delete one stored file without the store's knowledge; returns the stored name."""
    stored = name if name == "manifest.json" else artifact.file(name).stored
    path = f"{artifact.name}/{stored}"
    if change is None:
        artifact.objects.delete([path])
    else:
        data = artifact.objects.get(path)
        assert data is not None
        artifact.objects.put(path, change(data))
    return stored


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


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


def test_a_writer_continues_what_a_dead_one_finished(store: ArtifactStore) -> None:
    with store.lease("images", "abc"):
        first = store.begin("images", "abc")
        first.put_table(0, table(0), meta={"source": "a"})
        first.put_table(2, table(2))
        first.put_file("curves.png", b"of the first")
        first.record("shard 0", {"images": 10})
        first.record("odd/name: ü", {"images": 1})
    # Its lease is given back: the next writer continues.
    second = store.begin("images", "abc")
    kept = second.shard_done(0)
    assert kept is not None
    assert (kept.rows, kept.meta) == (10, {"source": "a"})
    assert second.shard_done(1) is None
    assert second.shard_done(2) is not None
    assert second.shard_done(0, ".bin") is None
    assert second.records() == {"shard 0": {"images": 10}, "odd/name: ü": {"images": 1}}
    second.put_table(1, table(1))
    artifact = second.commit()
    assert artifact.rows == 30
    assert [entry.name for entry in artifact.manifest.files] == [f"part-{i:05d}.parquet" for i in range(3)]


def test_without_the_artifacts_lease_an_attempt_lives_as_long_as_one_of_its_own(store: ArtifactStore) -> None:
    writer = store.begin("images", "abc")
    writer.put_table(0, table(0))
    assert writer._lease is not None
    lease = lease_path(writer._lease.artifact)
    mine = Holder.from_bytes(store.objects.get(lease) or b"")
    assert mine is not None
    for owner, beat, left_alone in (
        (mine.owner, time.time(), True),
        (Owner("another machine", "node-7", 123, "456"), time.time(), True),  # cannot be looked at from here
        (Owner("another machine", "node-7", 123, "456"), time.time() - 3600, False),  # silent for an hour
    ):
        store.objects.put(lease, replace(mine, owner=owner, beat=beat).to_bytes())
        with store.lease("images", "abc"):  # holding this one is no reason to take over what lives
            assert (store.begin("images", "abc").shard_done(0) is None) == left_alone
        assert writer._attempt.exists() == left_alone
    writer.close()


def test_a_shard_that_went_bad_meanwhile_is_not_continued(store: ArtifactStore) -> None:
    with store.lease("images", "abc"):
        first = store.begin("images", "abc")
        entries = [first.put_table(index, table(index)) for index in range(3)]
        data = store.objects.get(f"images/abc/{entries[0].stored}")
        assert data is not None
        store.objects.put(f"images/abc/{entries[0].stored}", flip(data))
        store.objects.delete([f"images/abc/{entries[1].stored}"])
    second = store.begin("images", "abc")
    assert [second.shard_done(index) is not None for index in range(3)] == [False, False, True]


def test_a_file_that_is_gone_at_the_commit_is_named(store: ArtifactStore) -> None:
    writer = store.begin("images", "abc")
    entry = writer.put_table(0, table(0))
    store.objects.delete([f"images/abc/{entry.stored}"])
    with pytest.raises(StoreError, match=f"images/abc cannot be committed: {entry.stored}: it is missing"):
        writer.commit()
    assert store.find("images", "abc") is None


def test_two_live_writers_never_share_files_and_the_second_adopts(store: ArtifactStore) -> None:
    first, second = store.begin("images", "abc"), store.begin("images", "abc")
    first.put_table(0, table(0))
    second.put_table(0, table(5))
    second.put_table(1, table(6))
    assert first.shard_done(1) is None
    won = first.commit(notes={"who": "first"})
    adopted = second.commit(notes={"who": "second"})
    assert adopted == won
    assert store.find("images", "abc") == won
    assert pq.read_table(won.local("part-00000.parquet")).equals(table(0))
    assert len(store.objects.walk("images")) == 2  # the loser's files are gone


def test_who_is_late_adopts_even_when_its_own_files_were_swept(store: ArtifactStore) -> None:
    first, second = store.begin("images", "abc"), store.begin("images", "abc")
    first.put_file("a.bin", b"first")
    entry = second.put_file("a.bin", b"second")
    won = first.commit()
    store.objects.delete([f"images/abc/{entry.stored}"])
    assert second.commit() == won


def test_replace_puts_a_new_artifact_in_place_of_the_old(store: ArtifactStore) -> None:
    make(store)
    writer = store.begin("images", "abc")
    writer.put_file("only.bin", b"1")
    new = writer.commit(replace=True)
    assert store.find("images", "abc") == new
    assert store.verify(new) == []
    assert len(store.objects.walk("images")) == 2


def test_shards_with_different_columns_are_refused(store: ArtifactStore) -> None:
    writer = store.begin("images", "abc")
    writer.put_table(0, table(0))
    writer.put_table(1, table(1).drop_columns(["key"]))
    with pytest.raises(StoreError, match=r"part-00001.parquet has other columns than part-00000.parquet"):
        writer.commit()


def test_a_writer_that_was_swept_away_says_so(store: ArtifactStore) -> None:
    writer = store.begin("images", "abc")
    writer.put_table(0, table(0))
    store.objects.delete_folder("images/abc")
    store.objects.delete_folder("images/abc.progress")
    with pytest.raises(StoreError, match="its unfinished files are gone"):
        writer.commit()
    stranger = pickle.loads(pickle.dumps(writer))
    from pipeline.store import writer as module

    module._CHECKED.clear()  # as a process on a node that does not share the folder
    with pytest.raises(StoreError, match="must be a folder that all nodes share"):
        stranger.put_table(1, table(1))


def test_other_processes_write_shards_through_a_pickled_writer(store: ArtifactStore, tmp_path: Path) -> None:
    writer = store.begin("images", "abc")
    (tmp_path / "writer").write_bytes(pickle.dumps(writer))
    script = f"""
import pickle, pyarrow as pa
writer = pickle.load(open({str(tmp_path / "writer")!r}, "rb"))
ids = list(range(10, 20))
writer.put_table(1, pa.table({{"image_id": pa.array(ids, pa.int64()), "key": [f"image {{i}}" for i in ids]}}))
writer.record("shard 1", {{"images": 10}})
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    assert writer.shard_done(1) is not None
    writer.put_table(0, table(0))
    assert writer.records() == {"shard 1": {"images": 10}}
    artifact = writer.commit()
    again = pickle.loads(pickle.dumps(artifact))
    assert again == artifact
    assert len({again, artifact}) == 1
    assert pq.read_table(again.local("part-00001.parquet")).equals(table(1))


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
