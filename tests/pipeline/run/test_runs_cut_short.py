"""What is left of a run whose store fills up, or goes away, while it works: an answer, and nothing half-visible."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.pipeline.workshop import PIPELINE, Workshop

KIB = 1024
ROOM = 200 * KIB  # enough for the 100 KiB of the first stage, not for the 280 KiB of the second
LONGER = "stages.scaled.factor=1.00000000001"  # every number gets 12 digits


@pytest.fixture
def many(workshop: Workshop) -> Workshop:
    """A workshop whose second artifact is larger than its first."""
    (workshop.folder / "numbers.txt").write_text("1\n" * 20_000)
    return workshop


def run(workshop: Workshop, before: Callable[[], None] | None = None) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "run", "p.yaml", "--set", LONGER],
        cwd=workshop.folder,
        env=os.environ | workshop.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=before,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def small_disk(many: Workshop) -> Iterator[Path]:
    """The store is a disk of its own, of 256 KiB."""
    store = many.folder / "store"
    store.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(store)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.decode()}")
    yield store
    subprocess.run(["umount", "-l", str(store)], check=True)


def expect_one_whole_artifact(workshop: Workshop) -> None:
    found = workshop.json("artifacts", "verify", "--store", "store")
    assert found == {"checked": 1, "damaged": [], "notes": []}
    assert [row["stage"] for row in workshop.json("artifacts", "ls", "--store", "store")] == ["numbers"]


def test_a_disk_that_fills_up_stops_the_stage_and_leaves_no_half_of_it(many: Workshop, small_disk: Path) -> None:
    code, shown = run(many)
    assert code == 1, shown
    assert "stage 'scaled' failed: store " in shown
    assert re.search(
        r"its disk is full, 0\.\d MiB needed, 0\.\d MiB free \(free space \(`tessera artifacts gc`\)", shown
    )
    assert "Traceback" not in shown
    expect_one_whole_artifact(many)
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    assert run(many)[0] == 0
    assert many.ran.count("numbers") == 1


def test_a_limit_on_the_size_of_files_stops_the_stage_and_leaves_no_half_of_it(many: Workshop) -> None:
    code, shown = run(many, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, ROOM)))
    assert code == 1, shown
    assert "stage 'scaled' failed: store " in shown
    assert "a file would be larger than is allowed there (raise the limit, `ulimit -f`, or name a store on" in shown
    assert "Traceback" not in shown
    expect_one_whole_artifact(many)
    assert run(many)[0] == 0
    assert many.ran.count("numbers") == 1


def test_a_store_that_is_deleted_in_the_middle_stops_the_stage_that_writes(workshop: Workshop) -> None:
    (hold := workshop.folder / "hold-before-writing").touch()
    process = workshop.start("run", "p.yaml")
    while not (workshop.folder / "hold-has-read").exists():
        assert process.poll() is None
        time.sleep(0.02)
    shutil.rmtree(workshop.folder / "store")
    hold.unlink()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert "stage 'scaled' failed: numbers/" in errors
    assert "does not hold what the driver began there (if it was deleted meanwhile, run the same command" in errors
    assert "Traceback" not in errors
    assert workshop.json("artifacts", "ls", "--store", "store") == []
    assert set(workshop.states("run", "p.yaml").values()) == {"done"}


def test_inputs_that_are_deleted_in_the_middle_stop_the_stage_that_reads(workshop: Workshop) -> None:
    """The artifact goes, and the store stays: the reader names the file, and the next run makes it again."""
    workshop.tessera("run", "p.yaml", "--only", "numbers")
    workshop.hold.touch()
    process = workshop.start("run", "p.yaml")
    workshop.wait_for("scaled")
    shutil.rmtree(workshop.folder / "store" / "numbers")
    workshop.hold.unlink()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert "stage 'scaled' failed: artifact numbers/" in errors
    assert "it is missing" in errors
    assert "Traceback" not in errors
    assert set(workshop.states("run", "p.yaml").values()) == {"done"}


@pytest.mark.chaos
@pytest.mark.ray
def test_a_full_disk_under_rays_own_folder_is_named_and_the_next_run_completes(workshop: Workshop) -> None:
    workshop.write(PIPELINE.replace("fake_scaled", "fake_on_ray"))
    disk = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # short: Ray puts sockets into it
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.decode()}")
    try:
        with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * KIB)
        workshop.extra["RAY_TMPDIR"] = str(disk)
        shown = workshop.outside("run", "p.yaml", code=1)
        assert f"{disk}/tessera-" in shown.stderr
        assert "is on a full disk: 0 MiB free, at least 16 MiB needed (free space there, or set RAY_T" in shown.stderr
        assert "Traceback" not in shown.stderr
        expect_one_whole_artifact(workshop)
        (disk / "filler").unlink()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        workshop.outside("run", "p.yaml")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
        disk.rmdir()
    assert workshop.ran.count("numbers") == 1
