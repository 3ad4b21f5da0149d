"""A Ray head with a dashboard and a token, as an operator starts one by hand; it has its own ports and folders."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TOKEN = "0123456789abcdef" * 4


@dataclass(frozen=True)
class Head:
    """A running head."""

    address: str  # of its job server
    pid: int


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started_head(cpus: int, environment: dict[str, str]) -> Iterator[Head]:
    """Start a head and end it.

    Args:
        cpus: it has.
        environment: of the head, which its jobs inherit, beside this process's.
    """
    folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))  # short, because Ray puts sockets into it
    port, dashboard = free_port(), free_port()
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--num-cpus={cpus}", f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    # Its agent takes any port: the usual one may belong to another Ray of this machine, and then no job is started.
    command += ["--dashboard-agent-listen-port=0", f"--temp-dir={folder}", "--object-store-memory=100000000"]
    log = (folder / "head.log").open("w")
    # With Ray's own niceness, jobs would wait for all other processes of a busy machine.
    tokens = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_worker_niceness": "0"}
    process = subprocess.Popen(
        command, env={**os.environ, **tokens, **environment}, stdout=log, stderr=log, start_new_session=True
    )
    try:
        end = time.monotonic() + 180
        while "Ray runtime started" not in (text := (folder / "head.log").read_text()):
            assert process.poll() is None, text
            assert time.monotonic() < end, text
            time.sleep(0.2)
        yield Head(f"http://127.0.0.1:{dashboard}", process.pid)
    finally:
        process.send_signal(signal.SIGTERM)  # with --block it ends what it has started
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.close()
        shutil.rmtree(folder, ignore_errors=True)
