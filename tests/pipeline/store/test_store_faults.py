"""Writers that are killed: the store then holds a whole artifact, or garbage that gc removes."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

from pipeline.store.manifest import MANIFEST
from pipeline.store.store import ArtifactStore
from tests.pipeline.store.store_processes import SHARDS, content, write

ROOT = Path(__file__).resolve().parents[3]
NOW = timedelta(0)


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.pipeline.store.store_processes", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def finish(*arguments: str) -> None:
    process = start(*arguments)
    process.communicate(timeout=120)
    assert process.returncode == 0


def assert_no_half(store: ArtifactStore, kind: str = "encoder") -> int:
    """Check that every artifact is whole and that gc removes everything else; returns how many artifacts there are."""
    assert list(store.damaged()) == []
    whole = list(store.artifacts())
    for artifact in whole:
        assert store.verify(artifact) == []
        assert len(list(artifact.shards())) == SHARDS
    store.gc(older_than=NOW)
    wanted = {f"{a.name}/{entry.stored}" for a in whole for entry in a.manifest.files}
    wanted |= {f"{a.name}/{MANIFEST}" for a in whole}
    assert {found.path for found in store.objects.walk(kind)} == wanted
    assert store.objects.walk(".tessera/leases") == [] or all(
        not found.path.endswith(".json") for found in store.objects.walk(".tessera/leases")
    )
    assert store.objects.walk(".tessera/scratch") == []
    return len(whole)


def test_a_writer_killed_at_every_single_change_of_the_store(tmp_path: Path) -> None:
    finish("crashes", str(tmp_path))
    points = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    assert len(points) > 20
    outcomes = set()
    for point in points:
        continued = ArtifactStore(shutil.copytree(point, tmp_path / f"{point.name}-continued"))
        finished = len(continued.objects.walk("encoder/abc.progress"))

        outcomes.add(assert_no_half(ArtifactStore(point)))

        if continued.find("encoder", "abc") is None:
            done = write(continued.address, "encoder", "abc")
            assert len(done) == SHARDS
            if finished > 6:  # some shards were recorded as finished: they are kept
                assert "kept 0" in done
        artifact = continued.find("encoder", "abc")
        assert artifact is not None
        assert [artifact.read(entry.name) for entry in artifact.shards()] == [content(i) for i in range(SHARDS)]
        assert continued.verify(artifact) == []
        assert assert_no_half(continued) == 1
    assert outcomes == {0, 1}  # some died before the commit, some after it


@pytest.mark.slow
def test_a_writer_killed_at_random_moments(tmp_path: Path) -> None:
    chance = random.Random(0)
    store = ArtifactStore(tmp_path / "store")
    for _ in range(4):
        process = start("endless", store.address)
        assert process.stdout is not None
        process.stdout.readline()  # the first one is committed
        time.sleep(chance.uniform(0.0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert assert_no_half(store) >= 1
        for artifact in list(store.artifacts()):
            store.discard(artifact.kind, artifact.fingerprint)


def test_two_processes_that_commit_at_once_never_mix(tmp_path: Path) -> None:
    finish("races", str(tmp_path), "8")
    for number in range(8):
        store = ArtifactStore(tmp_path / f"race-{number}")
        (artifact,) = store.artifacts()
        who = artifact.manifest.notes["who"]
        assert [artifact.read(entry.name) for entry in artifact.shards()] == [content(i, who) for i in range(SHARDS)]
        assert artifact.read("summary.json") == f'{{"who": "{who}"}}'.encode()
        assert store.verify(artifact) == []
        assert assert_no_half(store) == 1


def test_the_lease_of_a_killed_process_is_taken_over_at_once(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    process = start("hold", store.address)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    waited_for: list[str] = []
    lease = store.lease("encoder", "abc")
    assert not lease.try_acquire()

    process.send_signal(signal.SIGKILL)
    time.sleep(0.2)  # nobody waits for it, so it is a zombie, which counts as dead
    began = time.monotonic()
    lease.acquire(lambda holder: waited_for.append(str(holder)), timeout=10)
    assert time.monotonic() - began < 2.0
    lease.release()
    process.wait()
    process.stdout.close()


def test_gc_leaves_alone_what_a_live_process_holds(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    process = start("hold", store.address)
    assert process.stdout is not None
    process.stdout.readline()
    stray = tmp_path / "encoder" / "abc" / "part-00000.0123456789ab.bin"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"half")
    try:
        assert store.gc(older_than=NOW) == []
        assert stray.exists()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert [removed.path for removed in store.gc(older_than=NOW)] == ["encoder/abc"]
    assert not stray.exists()
