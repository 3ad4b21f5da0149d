"""Shards: how they are cut, that a killed ingest continues, and that Ray's way gives the same artifact."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import SourceError
from pipeline.stage import Context, Outcome, Resources
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.ingest import write
from stages.ingest.layout import Item, Raw
from stages.ingest.settings import IngestConfig
from stages.ingest.stage import Ingest, make_layout
from tests.conftest import ROOT
from tests.stages.ingest.conftest import FINGERPRINT

Make = Callable[..., Path]


@given(st.lists(st.integers(0, 3_000_000), max_size=60), st.integers(1, 9), st.integers(1, 4))
def test_cut_keeps_order_and_limits(sizes: list[int], rows: int, megabytes: int) -> None:
    items = [Item(f"{i:03d}", "train", size) for i, size in enumerate(sizes)]
    shards = write.cut(items, IngestConfig(source="x", shard_rows=rows, shard_mb=megabytes))
    assert [item for shard in shards for item in shard] == items
    for shard in shards:
        assert 1 <= len(shard) <= rows
        assert len(shard) == 1 or sum(item.size for item in shard) <= megabytes << 20


@given(st.integers(1, 5000))
def test_shards_grow_with_the_set(count: int) -> None:
    items = [Item(f"{i:05d}", "train", 1) for i in range(count)]
    sizes = [len(shard) for shard in write.cut(items, IngestConfig(source="x"))]
    assert sum(sizes) == count
    assert max(sizes) <= 1024
    assert len(sizes) <= 33


@given(st.integers(1, 50), st.integers(1, 60))
def test_spread(count: int, limit: int) -> None:
    items = [Item(f"{i:03d}", "train", 1) for i in reversed(range(count))]
    chosen = [int(item.key) for item in write.spread(items, limit)]
    assert len(chosen) == min(count, limit)
    assert chosen == sorted(set(chosen))


@pytest.fixture
def source(tmp_path: Path, make_image: Make) -> Path:
    """Twelve images, three of them unreadable, one whole shard of three among them."""
    folder = tmp_path / "in"
    for i in range(12):
        make_image(folder / f"{i:02d}.jpg", seed=i)
    for i in (3, 4, 5, 9):
        (folder / f"{i:02d}.jpg").write_bytes(b"broken")
    return folder


def run(store: ArtifactStore, source: Path, **settings: Any) -> tuple[Outcome, Artifact]:
    writer = store.begin("images", FINGERPRINT)
    config = IngestConfig(source=str(source), shard_rows=3, **settings)
    outcome = Ingest(config).run(Context("images", FINGERPRINT, {}, writer, Resources()))
    return outcome, writer.commit({"counts": outcome.counts, "problems": outcome.problems})


def content(artifact: Artifact) -> list[tuple[str, str]]:
    return [(entry.name, entry.sha256) for entry in artifact.shards()]


_DIES_AT_THE_THIRD_SHARD = """
import os, signal, sys
from pathlib import Path
from pipeline.store.store import ArtifactStore
from stages.ingest import write
from tests.stages.ingest.test_write import run

check_all = write.check_all

def dies(layout, vocabulary, items, threads):
    if items[0].key == "06.jpg":
        os.kill(os.getpid(), signal.SIGKILL)
    return check_all(layout, vocabulary, items, threads)

write.check_all = dies
run(ArtifactStore(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_killed_ingest_reads_nothing_twice(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = run(ArtifactStore(str(tmp_path / "whole")), source)
    store, seen = ArtifactStore(str(tmp_path / "store")), []
    command = [sys.executable, "-c", _DIES_AT_THE_THIRD_SHARD, store.address, str(source)]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert store.find("images", FINGERPRINT) is None
    check_all = write.check_all

    def watched(layout: Any, vocabulary: Any, items: Sequence[Item], threads: int) -> Any:
        seen.extend(item.key for item in items)
        return check_all(layout, vocabulary, items, threads)

    monkeypatch.setattr(write, "check_all", watched)
    outcome, artifact = run(store, source)
    assert seen == [f"{i:02d}.jpg" for i in range(6, 12)]  # the shard without a usable image is not read again either
    assert content(artifact) == content(whole)
    assert [problem["key"] for problem in outcome.problems] == ["03.jpg", "04.jpg", "05.jpg", "09.jpg"]
    assert outcome.counts["images"] == 8


@pytest.mark.slow
def test_ray_tasks_give_the_same_artifact(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, ray_local: None
) -> None:
    _, threads = run(ArtifactStore(str(tmp_path / "threads")), source)
    monkeypatch.setattr(write, "RAY_FROM", 1)
    monkeypatch.setattr(write, "_Threads", None)  # must not be used
    outcome, tasks = run(ArtifactStore(str(tmp_path / "tasks")), source)
    assert content(tasks) == content(threads)
    assert outcome.counts["images"] == 8
    with pytest.raises(SourceError, match=r"03\.jpg: not an image"):
        run(ArtifactStore(str(tmp_path / "fail")), source, on_error="fail")


def test_a_failing_network_is_not_an_unreadable_image(tmp_path: Path, source: Path) -> None:
    """Only what is wrong with the image itself is skipped; anything else stops the stage."""
    layout = make_layout(IngestConfig(source=str(source)))

    def cut_off(item: Item) -> Raw:
        raise ConnectionError("the cable is out")

    layout.read = cut_off  # type: ignore[method-assign]
    listing = layout.candidates()
    with pytest.raises(ConnectionError):
        write.check_all(layout, listing.vocabulary, listing.items, 2)
