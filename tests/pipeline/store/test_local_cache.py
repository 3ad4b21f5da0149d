"""Local paths of an artifact's files: checked, downloaded and hashed once for a machine, not by every worker."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ArtifactDamaged, StoreError
from pipeline.store import local_cache
from pipeline.store.artifact import Artifact
from pipeline.store.objects import Objects
from pipeline.store.store import ArtifactStore


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read to be hashed."""
    names: list[str] = []
    plain = local_cache.differs

    def counted(path: Path, entry: local_cache.FileEntry) -> str:
        names.append(entry.name)
        return plain(path, entry)

    monkeypatch.setattr(local_cache, "differs", counted)
    return names


def make(store: ArtifactStore, data: bytes = b"data") -> Artifact:
    writer = store.begin("encoder", "abc")
    writer.put_file("encoder.bin", data)
    return writer.commit()


def new_process() -> None:
    """Forget what only this process knows."""
    local_cache._SEEN.clear()


def grown_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as old enough for their tags to be trusted, without waiting."""
    monkeypatch.setattr(local_cache, "GRAIN_NS", -(10**18))


def test_a_local_store_hands_out_its_own_file_and_hashes_it_once_a_machine(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    grown_old(monkeypatch)
    artifact = make(ArtifactStore(tmp_path / "store"))
    path = artifact.local("encoder.bin")
    assert path.parent == tmp_path / "store" / "encoder" / "abc"
    new_process()
    assert artifact.local("encoder.bin") == path
    assert hashed == ["encoder.bin"]
    os.utime(path)  # touched, so it is read again
    assert artifact.local("encoder.bin") == path
    assert hashed == ["encoder.bin"] * 2


def test_a_young_file_is_hashed_again_since_its_times_prove_nothing(tmp_path: Path, hashed: list[str]) -> None:
    artifact = make(ArtifactStore(tmp_path / "store"))
    path = artifact.local("encoder.bin")
    assert time.time() - path.stat().st_ctime < 2
    path.write_bytes(b"DATA")
    with pytest.raises(ArtifactDamaged):
        artifact.local("encoder.bin")
    assert hashed == ["encoder.bin"] * 2


def test_a_bucket_is_downloaded_once_a_machine(
    s3_address: str, cache: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    grown_old(monkeypatch)
    artifact = make(ArtifactStore(s3_address))
    path = artifact.local("encoder.bin")
    assert path == cache / "files" / "3a" / f"{hashlib.sha256(b'data').hexdigest()}.bin"
    assert path.read_bytes() == b"data"
    artifact.objects.delete([f"encoder/abc/{artifact.file('encoder.bin').stored}"])
    new_process()
    assert artifact.local("encoder.bin") == path  # without the bucket
    assert hashed == ["encoder.bin"]
    assert not list(cache.rglob(".download-*"))


def _fetch(artifact: Artifact, downloads: Path) -> bytes:
    """What a rank does; notes each download, which takes long enough for the others to come."""
    plain = local_cache._download

    def noted(*given: Any) -> None:
        with downloads.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(1)
        plain(*given)

    local_cache._download = noted  # of this process, which ends with the test
    return artifact.local("encoder.bin").read_bytes()


def test_ranks_of_one_machine_download_a_file_once(tmp_path: Path, s3_address: str) -> None:
    artifact = make(ArtifactStore(s3_address))
    downloads = tmp_path / "downloads"
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        contents = pool.starmap(_fetch, [(artifact, downloads)] * 3, chunksize=1)
    assert contents == [b"data"] * 3
    assert len(downloads.read_text().splitlines()) == 1


def test_a_copy_that_went_bad_is_fetched_again(s3_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grown_old(monkeypatch)
    artifact = make(ArtifactStore(s3_address))
    path = artifact.local("encoder.bin")
    path.write_bytes(b"DATA")
    assert artifact.local("encoder.bin").read_bytes() == b"data"


@pytest.mark.parametrize("spoil", [lambda o, p: o.put(p, b"DATA"), lambda o, p: o.delete([p])])
def test_a_damaged_object_is_named_and_never_left_in_the_cache(
    s3_address: str, cache: Path, spoil: Callable[[Objects, str], None]
) -> None:
    artifact = make(ArtifactStore(s3_address))
    stored = artifact.file("encoder.bin").stored
    spoil(artifact.objects, f"encoder/abc/{stored}")
    with pytest.raises(ArtifactDamaged, match=stored):
        artifact.local("encoder.bin")
    assert [path for path in (cache / "files").rglob("*") if path.is_file()] == []


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, s3_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "file"))
    artifact = make(ArtifactStore(s3_address))
    with pytest.raises(StoreError, match=r"cannot be written: .* \(set TESSERA_CACHE"):
        artifact.local("encoder.bin")
