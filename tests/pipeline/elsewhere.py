"""Processes that take themselves for another machine, with a clock of its own, for tests of what machines share."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
SKEWED = Path(__file__).with_name("skewed")  # what Python needs to bear libfaketime
NAME = "elsewhere"  # of the other machine


def require() -> None:
    """Skip the test where a process can be given no other clock, or no other host name."""
    if FAKETIME is None:
        pytest.skip("needs libfaketime (Debian's package faketime)")
    tried = subprocess.run(["unshare", "--uts", "hostname", NAME], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no process can be given another host name here: {tried.stderr}")


def start(command: list[str], skew: str, folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start a command on the other machine.

    Args:
        command: to run; the process that is returned becomes it.
        skew: what its clock is wrong by, as libfaketime takes it: "-10m".
        folder: to run it in.
        environment: beside this process's.
    """
    path = os.pathsep.join(filter(None, [str(SKEWED), environment.get("PYTHONPATH")]))
    clock = {"LD_PRELOAD": str(FAKETIME), "FAKETIME": skew, "FAKETIME_DONT_FAKE_MONOTONIC": "1", "PYTHONPATH": path}
    return subprocess.Popen(
        ["unshare", "--uts", "sh", "-c", f'hostname {NAME} && exec "$@"', "sh", *command],
        cwd=folder,
        env={**os.environ, **environment, **clock},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
