"""A store on a local folder and on S3 (a real server, over HTTP), and what the tests put into it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore


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
