"""Ends a run whose cluster has lost its head: what Ray calls wait for then never comes.

Ray itself ends its drivers only as long as nothing answers at the head's address. Where a new head is started there at
once, as Kubernetes does, the driver's requests are refused, for ever and in silence.
"""

from __future__ import annotations

import os
import sys
import threading
import time

ASK_SECONDS = 15.0  # between two questions
AWAY_SECONDS = 120.0  # a head that is away for longer does not come back with what it knew
EXIT_CODE = 1


class HeadWatch(threading.Thread):
    """Asks the head from time to time whether it is still the same.

    Args:
        address: host:port of the cluster that this process has joined.
    """

    def __init__(self, address: str) -> None:
        super().__init__(name="head-watch", daemon=True)
        self.address, self._over = address, threading.Event()

    def run(self) -> None:
        """Until `stop`, or the end of the process."""
        first, answered = _session(self.address), time.monotonic()
        while first and not self._over.wait(ASK_SECONDS):
            session = _session(self.address)
            if session == first:
                answered = time.monotonic()
            elif self._over.is_set():
                return
            elif session:
                _end(f"the head of the Ray cluster at {self.address} was replaced by a new one, which knows no run")
            elif time.monotonic() - answered > AWAY_SECONDS:
                _end(f"the head of the Ray cluster at {self.address} has been away for {AWAY_SECONDS:g} s")

    def stop(self) -> None:
        """The run has left the cluster."""
        self._over.set()


def _session(address: str) -> str:
    """The name of the session of the head at an address; "" where it does not answer, or this Ray cannot be asked."""
    try:
        from ray._private.ray_constants import KV_NAMESPACE_SESSION
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        found = GcsClient(address=address).internal_kv_get(b"session_name", KV_NAMESPACE_SESSION)
        return bytes(found or b"").decode()
    except Exception:  # no answer, refused, or a Ray that keeps these functions elsewhere
        return ""


def _end(why: str) -> None:
    """End the process at once: threads that wait inside Ray cannot be reached. Leases of a dead process are free."""
    print(f"error: {why}: the run ends here; run the same command again, it continues", file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)
