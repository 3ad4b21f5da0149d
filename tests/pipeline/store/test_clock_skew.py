"""Machines whose clocks differ share a store: a lease is not taken from the living, and not kept for the dead."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import StoreError
from pipeline.store.lease import STALE, Lease, live_holder
from pipeline.store.store import ArtifactStore
from tests.pipeline import elsewhere
from tests.pipeline.workshop import FAKES, Workshop

pytestmark = pytest.mark.chaos
ROOT = Path(__file__).resolve().parents[3]
BEAT = 0.2


@pytest.fixture(params=["local", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    elsewhere.require()
    return str(tmp_path / "shared") if request.param == "local" else str(request.getfixturevalue("s3_address"))


@pytest.fixture(params=["-10m", "+10m", "-70m"])
def holder(request: pytest.FixtureRequest, address: str) -> Iterator[subprocess.Popen[str]]:
    """A process of another machine that holds a lease and renews it."""
    command = [sys.executable, "-m", "tests.pipeline.store.store_processes", "beat", address, str(BEAT)]
    process = elsewhere.start(command, request.param, ROOT, {})
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n", process.communicate()
    yield process
    process.kill()
    process.communicate()


def test_a_lease_is_the_living_ones_whatever_its_clock_says(address: str, holder: subprocess.Popen[str]) -> None:
    objects = ArtifactStore(address).objects
    lease = Lease(objects, "encoder/abc", beat=BEAT)  # gives up after 1.2 s without a beat
    found = lease.holder()
    assert found is not None
    assert abs(found.beat - time.time()) > 500
    with pytest.raises(StoreError, match=f"is still being computed by process {holder.pid} on {elsewhere.NAME}"):
        lease.acquire(timeout=4)
    assert live_holder(objects, "encoder/abc") is not None

    holder.kill()
    holder.wait()
    began = time.monotonic()
    lease.acquire(timeout=20)
    assert time.monotonic() - began < 15
    lease.release()


@pytest.mark.parametrize("address", ["s3"], indirect=True)
@pytest.mark.parametrize("skew", ["-10m", "+10m"])
def test_two_runs_on_machines_whose_clocks_differ_compute_every_stage_once(
    workshop: Workshop, address: str, skew: str
) -> None:
    workshop.hold.touch()
    command = [sys.executable, "-m", "pipeline.cli", "run", "p.yaml", "--store", address, "--json"]
    path = {"PYTHONPATH": f"{FAKES}:{ROOT}"}
    first = elsewhere.start(command, skew, workshop.folder, {**workshop.environment(), **path})
    second = None
    try:
        workshop.wait_for("scaled")
        second = workshop.start("run", "p.yaml", "--store", address, "--json")
        time.sleep(12)  # a heartbeat and more
        assert second.poll() is None
        assert workshop.ran == ["numbers", "scaled"]
        workshop.hold.unlink()
        for process in (first, second):
            errors = process.communicate(timeout=STALE)[1]
            assert process.returncode == 0, errors
    finally:
        first.kill()
        first.communicate()
    assert sorted(workshop.ran) == ["encoder", "numbers", "scaled", "score"]
    assert workshop.json("artifacts", "verify", "--store", address)["damaged"] == []


@pytest.mark.parametrize("address", ["local"], indirect=True)
def test_a_run_takes_over_from_a_dead_machine_whose_clock_was_ahead(workshop: Workshop, address: str) -> None:
    workshop.hold.touch()
    command = [sys.executable, "-m", "pipeline.cli", "run", "p.yaml", "--store", address]
    path = {"PYTHONPATH": f"{FAKES}:{ROOT}"}
    first = elsewhere.start(command, "+10m", workshop.folder, {**workshop.environment(), **path})
    workshop.wait_for("scaled")
    first.kill()
    first.communicate()
    workshop.hold.unlink()
    began = time.monotonic()
    workshop.outside("run", "p.yaml", "--store", address)
    assert STALE - 5 < time.monotonic() - began < STALE + 60
    assert sorted(workshop.ran) == ["encoder", "numbers", "scaled", "scaled", "score"]
