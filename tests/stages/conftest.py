"""One local Ray for all tests of stages, and small `images` artifacts in a store of their own."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.run import cluster
from pipeline.stage import Context, Resources
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from pipeline.store.writer import ArtifactWriter
from stages.data.tables import SCHEMAS
from tests.conftest import is_on_ray

RUNNING = pytest.StashKey[cluster.Cluster]()


@pytest.fixture
def ray_local(request: pytest.FixtureRequest, _own_cache: None) -> None:
    """A Ray with 2 CPUs, started for the first test that asks for it and shared with those that follow."""
    config = request.config
    if RUNNING not in config.stash:
        config.stash[RUNNING] = cluster.start("local")
        config.add_cleanup(lambda: _stop_ray(config))  # of a session that is interrupted


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the Ray where the next test's file has no use for it: it would hold memory, and its processes wake often."""
    if nextitem is None or not is_on_ray(nextitem.nodeid):
        _stop_ray(item.config)


def _stop_ray(config: pytest.Config) -> None:
    if RUNNING in config.stash:
        started = config.stash[RUNNING]
        del config.stash[RUNNING]
        cluster.stop(started)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "store"))


def write_images(store: ArtifactStore, files: Mapping[str, bytes], parts: Sequence[int], fingerprint: str) -> Artifact:
    """An `images` artifact of encoded files, `parts` rows a part."""
    rows = []
    for image_id, (key, data) in enumerate(files.items()):
        row = dict.fromkeys(SCHEMAS["images"].names)
        rows.append(row | {"image_id": image_id, "key": key, "image": data, "sha256": hashlib.sha256(data).hexdigest()})
    assert sum(parts) == len(rows)
    writer = store.begin("images", fingerprint)
    for index, size in enumerate(parts):
        table = pa.Table.from_pylist(rows[sum(parts[:index]) :][:size], schema=SCHEMAS["images"])
        writer.put_table(index, table)
    return writer.commit()


@pytest.fixture
def images(store: ArtifactStore) -> Callable[..., Artifact]:
    """`images({"a.jpg": bytes, ...}, parts=[3, 2])`."""

    fingerprints = (f"{number:012x}" for number in itertools.count(1))

    def make(files: Mapping[str, bytes], parts: Sequence[int] | None = None) -> Artifact:
        return write_images(store, files, parts or [len(files)], next(fingerprints))

    return make


@pytest.fixture
def context(store: ArtifactStore) -> Callable[..., Context]:
    """`context("boxes", images=artifact)`: what the runner hands to a stage."""

    def make(kind: str, fingerprint: str = "ba9876543210", cpus: float | None = None, **inputs: Artifact) -> Context:
        writer: ArtifactWriter = store.begin(kind, fingerprint)
        return Context(kind, fingerprint, inputs, writer, Resources(cpus=cpus))

    return make
