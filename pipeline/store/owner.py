"""Who is running: a process named so that another one can tell, at once and for certain, whether it still lives.

A process id alone is recycled, and means nothing in another container: the name also holds the machine (host, boot
and process-id namespace) and the process's start time. Leases, unfinished artifacts and scratch folders carry it.
"""

from __future__ import annotations

import os
import socket
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Owner:
    """One process on one machine."""

    machine: str  # equal only where process ids can be compared
    host: str  # for people
    pid: int
    started: str  # kernel's start time in ticks since boot; "" where the system does not tell

    def alive(self) -> bool | None:
        """Whether the process still runs; None when it is on another machine and nobody here can know."""
        if self.machine != machine():
            return None
        started = _started(self.pid)
        return started is not None and (not self.started or started == self.started)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Owner:
        """Raises: KeyError, TypeError or ValueError when `value` is not what `to_dict` wrote."""
        return cls(str(value["machine"]), str(value["host"]), int(value["pid"]), str(value["started"]))


def this_process() -> Owner:
    """The calling process (looked up anew: a fork has another id)."""
    pid = os.getpid()
    return Owner(machine(), socket.gethostname(), pid, _started(pid) or "")


@lru_cache(maxsize=1)
def machine() -> str:
    """Host name, boot and process-id namespace: containers of one host never take each other's ids for theirs."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    except OSError:
        pass  # not Linux: the host name has to do
    return "/".join(parts)


def _started(pid: int) -> str | None:
    """Start time of a running process; None when there is none, or only its unreaped remains (a zombie)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        return _started_without_proc(pid)
    fields = stat[stat.rindex(")") + 2 :].split()  # the name before it may hold spaces and brackets
    return None if fields[0] in "ZX" else fields[19]


def _started_without_proc(pid: int) -> str | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass  # it lives, and belongs to somebody else
    return ""
