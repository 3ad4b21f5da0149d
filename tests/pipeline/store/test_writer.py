"""What writers promise each other: one continues, one adopts, none mixes; on a local folder and on S3."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.errors import StoreError
from pipeline.store.lease import Holder, lease_path
from pipeline.store.owner import Owner
from pipeline.store.store import ArtifactStore
from tests.pipeline.store.conftest import flip, make, table


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
        (Owner("another machine", "node-7", 123, "456"), time.time() - 3 * 3600, False),  # silent for hours
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
