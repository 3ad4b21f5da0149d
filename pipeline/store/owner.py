"""Which process holds a lease, named so that another process can tell whether it still runs.

A process id alone is reused, and means nothing in another container. The name therefore also holds the machine (host,
boot and process-id namespace) and the time at which the process started.
"""

from __future__ import annotations

import os
import socket
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

TICKS = 100  # a second; the kernel's unit for start times
SLACK = 2 * TICKS  # the system's boot time is known in whole seconds, and may be rounded differently later


@dataclass(frozen=True)
class Owner:
    """One process on one machine."""

    machine: str  # equal only where process ids can be compared
    host: str  # for people
    pid: int
    started: str  # ticks between the system's start and the process's; "" where the system does not tell

    def alive(self) -> bool | None:
        """Whether the process still runs; None when it is on another machine and cannot be looked at from here."""
        if self.machine != machine():
            return None
        started = _started(self.pid)
        if started is None:
            return False
        if not started or not self.started:
            return True
        try:
            return abs(int(started) - int(self.started)) <= SLACK
        except ValueError:  # not a time that Tessera wrote
            return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def to_dict(self) -> dict[str, Any]:
        """Plain fields, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Owner:
        """Read what `to_dict` wrote.

        Raises:
            KeyError, TypeError, ValueError: `value` is something else.
        """
        return cls(str(value["machine"]), str(value["host"]), int(value["pid"]), str(value["started"]))


def this_process() -> Owner:
    """The calling process. Looked up at every call, because a fork has another id."""
    pid = os.getpid()
    return Owner(machine(), socket.gethostname(), pid, _started(pid) or "")


@lru_cache(maxsize=1)
def machine() -> str:
    """Host name, boot and process-id namespace: differs between the containers of one host."""
    found = [socket.gethostname()]
    try:
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        found.append(str(os.stat("/proc/self/ns/pid").st_ino))
    except OSError:
        pass  # not Linux: the host name has to do
    return "/".join(found)


def _started(pid: int) -> str | None:
    """Start time of a running process.

    None when there is no such process, or only its remains that nobody has waited for (a zombie); "" when there is
    one about which this user is told nothing more.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        # Counted from the system's start: both times move together when somebody sets the clock.
        return str(round((process.create_time() - psutil.boot_time()) * TICKS))
    except (psutil.NoSuchProcess, ValueError):  # ValueError: not an id that a process can have
        return None
    except psutil.AccessDenied:
        return ""
