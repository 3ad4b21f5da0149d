"""What gc removes, what it leaves alone, and what a dry run says about both; on a local folder and on S3."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import pytest

from pipeline.store import uses
from pipeline.store.artifact import Artifact
from pipeline.store.lease import Holder, lease_path
from pipeline.store.owner import Owner, machine
from pipeline.store.records import write_record
from pipeline.store.store import ArtifactStore

NOW = timedelta(0)
HOUR = timedelta(hours=1)
DEAD = Owner(machine(), "here", 2**22 + 1, "1")


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArtifactStore:
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "cache"))
    if request.param == "local":
        return ArtifactStore(tmp_path / "store")
    return ArtifactStore(request.getfixturevalue("s3_address"))


def make(store: ArtifactStore, fingerprint: str = "abc") -> Artifact:
    writer = store.begin("encoder", fingerprint)
    writer.put_file("encoder.bin", fingerprint.encode())
    return writer.commit()


def collect(
    store: ArtifactStore, older_than: timedelta = NOW, unneeded: Mapping[tuple[str, str], str] | None = None
) -> list[str]:
    """Paths that gc removes; a dry run must have announced the same, and removed nothing."""
    before = [found.path for found in store.objects.walk()]
    announced = store.gc(unneeded, older_than=older_than, dry_run=True)
    assert [found.path for found in store.objects.walk()] == before
    removed = store.gc(unneeded, older_than=older_than)
    assert removed == announced
    return [item.path for item in removed]


def test_a_store_in_order_holds_no_garbage(store: ArtifactStore) -> None:
    artifact = make(store)
    assert collect(store) == []
    assert store.verify(artifact) == []
    assert collect(ArtifactStore(store.address + "/nowhere")) == []


def test_uncommitted_leftovers_go_once_they_are_old_and_their_writer_is_gone(store: ArtifactStore) -> None:
    writer = store.begin("encoder", "abc")
    writer.put_file("encoder.bin", b"x")
    writer.record("epoch", {"loss": 1})
    (writer.progress_folder / "checkpoint").write_bytes(b"y")
    assert collect(store) == []  # this process is still at it
    writer.close()
    assert collect(store, HOUR) == []  # somebody may come back for it
    removed = store.gc(older_than=NOW)
    assert [(item.path, item.reason) for item in removed] == [("encoder/abc", "never committed")]
    assert removed[0].bytes > 0
    assert store.objects.walk("encoder") == []
    assert store.objects.walk("encoder/abc.progress") == []


def test_what_is_leased_stays(store: ArtifactStore) -> None:
    store.objects.put("encoder/abc/part-00000.0123.bin", b"x")
    with store.lease("encoder", "abc"):
        assert collect(store) == []
    assert collect(store) == ["encoder/abc"]


def test_files_that_no_manifest_knows_go_and_the_artifact_stays(store: ArtifactStore) -> None:
    artifact = make(store)
    store.objects.put("encoder/abc/part-00009.0123456789ab.bin", b"loser")
    store.objects.put("encoder/abc.progress/checkpoint", b"killed while cleaning up")
    assert collect(store, HOUR) == []
    assert collect(store) == ["encoder/abc/part-00009.0123456789ab.bin", "encoder/abc.progress"]
    assert store.verify(artifact) == []
    assert store.find("encoder", "abc") == artifact


def test_remains_of_an_interrupted_write_go(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    artifact = make(store)
    (tmp_path / "encoder" / "abc" / "encoder.0123456789ab.bin#1").write_bytes(b"hal")  # what a killed local put leaves
    assert collect(store) == ["encoder/abc/encoder.0123456789ab.bin#1"]
    assert store.verify(artifact) == []


def test_an_artifact_goes_when_somebody_says_so_and_nothing_speaks_for_it(store: ArtifactStore) -> None:
    kept, gone = make(store), {("encoder", "def"): "asked for"}
    make(store, "def")
    uses.note_use(store.objects, "encoder/def", "p", "warmup")
    assert collect(store, HOUR, gone) == []  # just made: perhaps for a pipeline that runs now
    with uses.needed_while(store.objects, ["encoder/def"]):
        assert collect(store, NOW, gone) == []
    uses.pin(store.objects, "encoder/def")
    assert collect(store, NOW, gone) == []
    assert uses.unpin(store.objects, "encoder/def")
    assert collect(store, NOW, gone) == ["encoder/def"]
    assert [artifact.name for artifact in store.artifacts()] == [kept.name]
    assert store.objects.walk(".tessera/memo/encoder/def.json") == []
    assert uses.uses(store.objects, "encoder/def") == []


def test_an_old_artifact_that_was_used_a_moment_ago_stays(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    make(store)
    for path in (tmp_path / "encoder" / "abc").iterdir():
        os.utime(path, (1, 1))
    uses.note_use(store.objects, "encoder/abc", "p", "warmup")
    assert collect(store, HOUR, {("encoder", "abc"): "asked for"}) == []
    for path in (tmp_path / ".tessera/records/used").rglob("*.json"):
        os.utime(path, (1, 1))
    assert collect(store, HOUR, {("encoder", "abc"): "asked for"}) == ["encoder/abc"]


def test_what_is_known_of_the_uses_of_a_deleted_artifact_goes(store: ArtifactStore) -> None:
    make(store)
    uses.note_use(store.objects, "encoder/abc", "p", "warmup")
    store.discard("encoder", "abc")  # as `--force` does before it computes anew: the uses are still true
    assert [use.pipeline for use in uses.uses(store.objects, "encoder/abc")] == ["p"]
    assert collect(store, HOUR) == []
    assert collect(store) == [".tessera/records/used/encoder/abc"]
    assert uses.uses(store.objects, "encoder/abc") == []


def test_what_a_killed_run_needed_is_no_longer_kept_and_its_note_goes(store: ArtifactStore) -> None:
    make(store)
    write_record(store.objects, "runs/killed", {"artifacts": ["encoder/abc"]})
    store.objects.put(lease_path("runs/killed"), Holder("token", DEAD, 0.0, 0.0).to_bytes())
    removed = collect(store, NOW, {("encoder", "abc"): "asked for"})
    assert removed == ["encoder/abc", lease_path("runs/killed"), ".tessera/records/runs/killed.json"]
    assert collect(store) == []


def test_a_broken_manifest_goes_with_its_files(store: ArtifactStore) -> None:
    make(store)
    store.objects.put("encoder/abc/manifest.json", b"{")
    assert collect(store, HOUR) == []
    assert collect(store) == ["encoder/abc"]
    assert list(store.damaged()) == []


def test_leases_of_the_dead_memos_of_the_gone_and_their_scratch_go(store: ArtifactStore) -> None:
    store.objects.put(lease_path("encoder/abc"), Holder("token", DEAD, 0.0, 0.0).to_bytes())
    store.objects.put(".tessera/memo/encoder/abc.json", b"{}")
    store.write_record("history/pipeline", {"kept": True})
    dead, live = store.begin("encoder", "dead"), store.begin("encoder", "live")
    scratch, scratch_in_use = dead.scratch, live.scratch
    for writer in (dead, live):
        (writer.scratch / "big").write_bytes(b"x" * 100)
    assert dead._lease is not None
    dead._lease.release()  # as when its process was killed: nothing else is cleaned up
    store.objects.put(lease_path(dead._lease.artifact), Holder("token", DEAD, 0.0, 0.0).to_bytes())
    assert collect(store, HOUR) == [lease_path("encoder/abc"), lease_path(dead._lease.artifact)]
    assert scratch.exists()  # somebody may look into it
    removed = collect(store)
    assert "encoder/dead" in removed
    assert len(removed) == 3
    assert not scratch.exists()
    assert scratch_in_use.exists()
    assert store.read_record("history/pipeline") == {"kept": True}
    assert store.objects.walk(".tessera/memo") == []


def test_age_counts_from_the_last_change_of_anything_beside_it(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    store.objects.put("encoder/abc/part-00000.0123456789ab.bin", b"x")
    os.utime(tmp_path / "encoder/abc/part-00000.0123456789ab.bin", (1, 1))
    store.objects.put("encoder/abc.progress/checkpoint", b"fresh")
    assert collect(store, HOUR) == []
    os.utime(tmp_path / "encoder/abc.progress/checkpoint", (1, 1))
    assert collect(store, HOUR) == ["encoder/abc"]
