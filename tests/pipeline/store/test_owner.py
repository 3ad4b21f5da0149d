"""Whether a process that a file names still runs: yes, no, or unknown because it is on another machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pipeline.store.owner import Owner, machine, this_process


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that sleeps."""
    process = subprocess.Popen([sys.executable, "-c", "import time; print(1, flush=True); time.sleep(600)"], stdout=-1)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def named(pid: int) -> Owner:
    """The process as it would have named itself."""
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return Owner(machine(), "here", pid, ticks)


def test_a_process_is_alive_until_it_ends_also_as_a_zombie(child: subprocess.Popen[bytes]) -> None:
    owner = named(child.pid)
    assert this_process().alive()
    assert owner.alive()
    child.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it is dead, and stays behind as a zombie
    assert owner.alive() is False
    child.wait()
    assert owner.alive() is False


def test_another_process_under_the_same_id_is_not_the_one_that_was_named() -> None:
    me = this_process()
    assert replace(me, started=str(int(me.started) - 300)).alive() is False
    assert replace(me, started="1").alive() is False


def test_a_clock_that_is_set_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    me = this_process()
    assert me.alive()
    since_the_epoch = psutil._pslinux.boot_time()
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: since_the_epoch + 3600)
    assert psutil.Process().create_time() > since_the_epoch + 3600
    assert me.alive()


@pytest.mark.parametrize("started", ["1732201234.56", "Thu Nov 21 15:26", "-", "9" * 40])
def test_a_start_time_in_an_unknown_form_is_not_taken_for_alive(started: str) -> None:
    assert replace(this_process(), started=started).alive() is False


@pytest.mark.parametrize("pid", [-1, 2**22 + 1, 2**70])
def test_an_id_that_no_process_has_is_dead(pid: int) -> None:
    assert replace(this_process(), pid=pid).alive() is False


def test_another_machine_or_container_cannot_be_looked_at() -> None:
    me = this_process()
    host, boot, namespace = machine().split("/")
    for elsewhere in (f"other/{boot}/{namespace}", f"{host}/another-boot/{namespace}", f"{host}/{boot}/1"):
        assert replace(me, machine=elsewhere).alive() is None


def test_a_name_survives_json() -> None:
    me = this_process()
    assert Owner.from_dict(me.to_dict()) == me
    assert str(me) == f"process {os.getpid()} on {me.host}"
