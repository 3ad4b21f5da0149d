"""A disk that is full where this machine keeps what it copies from a bucket: named, with what was needed, and mended.

The store's own disk: tests/pipeline/run/test_runs_cut_short.py.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.errors import StoreError
from pipeline.store.store import ArtifactStore

MIB = 1 << 20


@pytest.fixture
def small_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This machine's cache is a disk of its own, of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.decode()}")
    monkeypatch.setenv("TESSERA_CACHE", str(folder / "cache"))
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def make_room(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=32m", str(folder)], check=True)


def noise(index: int, size: int) -> pa.Table:
    """One row that does not get smaller by compression."""
    return pa.table({"image_id": pa.array([index], pa.int64()), "image": [os.urandom(size)]})


def test_a_shard_that_finds_no_room_in_the_cache_is_named_and_the_next_attempt_continues(
    small_cache: Path, s3_address: str
) -> None:
    store = ArtifactStore(s3_address)
    with store.lease("images", "abc"):
        writer = store.begin("images", "abc")
        writer.put_table(0, noise(0, 1000))
        rule = (
            rf"this machine's cache {small_cache}/cache cannot be written: .*, 3\.0 MiB needed, [01]\.\d MiB free "
            r"\(set TESSERA_CACHE to a folder with room"
        )
        with pytest.raises(StoreError, match=rule):
            writer.put_table(1, noise(1, 3 * MIB))
        writer.close()
    assert store.find("images", "abc") is None
    assert [found.path.split("/")[-1][:10] for found in store.objects.walk("images/abc")] == ["part-00000"]
    make_room(small_cache)
    with store.lease("images", "abc"):
        writer = store.begin("images", "abc")
        assert writer.shard_done(0) is not None
        writer.put_table(1, noise(1, 3 * MIB))
        artifact = writer.commit()
    assert store.verify(artifact) == []
    assert store.gc(older_than=timedelta(0)) == []


def test_a_file_that_finds_no_room_in_the_cache_is_named_and_leaves_nothing(small_cache: Path, s3_address: str) -> None:
    store, content = ArtifactStore(s3_address), os.urandom(3 * MIB)
    writer = store.begin("encoder", "abc")
    writer.put_file("encoder.safetensors", content)
    artifact = writer.commit()
    with pytest.raises(StoreError, match=r"cache .* cannot be written: No space left on device, 3\.0 MiB needed, "):
        artifact.local("encoder.safetensors")
    assert [path for path in (small_cache / "cache/files").rglob("*") if path.is_file()] == []
    make_room(small_cache)
    assert artifact.local("encoder.safetensors").read_bytes() == content
