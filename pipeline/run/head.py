"""Whether the head of a Ray cluster can be joined, asked before `ray.init`.

Ray itself would try for minutes, and print its lines meanwhile. So another process asks, which can be ended.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from importlib import metadata

from pipeline.errors import ClusterError

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 8.0  # a head answers in a tenth of a second
ASK = "from pipeline.run.head import _answer; _answer()"
_REFUSED = "(set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's token)"


def joinable(address: str) -> str:
    """The address, once the head of a cluster has answered there that fits this process.

    Raises:
        ClusterError: nothing answers, or no Ray, or a Ray that refuses this process or has another version.
    """
    if address == "auto":
        _require_same(address, _ask(address))
        return address
    if "://" in address:
        raise ClusterError(
            f"--address {address}: a run joins a cluster by the host:port of its head (Ray's default port is 6379), "
            "from a machine of that cluster"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ClusterError(f"--address {address}: expected host:port, 'auto' or 'local'")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address}: {error} "
            "(check --address and RAY_ADDRESS; without them a local Ray starts)"
        ) from error
    _require_same(address, _ask(address))
    return address


def _ask(address: str) -> dict[str, str]:
    """What the head says of itself: ray_version, python_version."""
    command = [sys.executable, "-c", ASK, address]
    # Unbuffered: what is read beyond the first line would be lost to `communicate`.
    asking = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    try:
        assert asking.stdout is not None
        asking.stdout.readline()  # Ray is imported, which takes its time on a busy machine
        output, errors = (text.decode() for text in asking.communicate(timeout=ANSWER_SECONDS))
    except subprocess.TimeoutExpired as error:
        asking.kill()
        asking.communicate()
        raise ClusterError(
            f"something answers at {address}, but not as the head of a Ray cluster does within {ANSWER_SECONDS:g} s "
            "(the port is the one of `ray start --head --port`, 6379 unless set; not the dashboard's 8265)"
        ) from error
    if asking.returncode == 0:
        found: dict[str, str] = json.loads(output.splitlines()[-1])
        return found
    last = (errors.strip().splitlines() or ["it ended without a word"])[-1]
    if "token" in last.lower() or "auth" in last.lower():
        has = "another token" if os.environ.get("RAY_AUTH_MODE") == "token" else "no token"
        raise ClusterError(f"the Ray cluster at {address} wants its token, and this process has {has} {_REFUSED}")
    if address == "auto":
        raise ClusterError(
            "--address auto: no Ray cluster runs on this machine (start one with `ray start --head`, name its address, "
            "or leave --address out: then a local Ray starts)"
        )
    raise ClusterError(f"the Ray cluster at {address} cannot be joined: {last[:300]}")


def _answer() -> None:
    """What the process that `_ask` starts does: print a line when it begins to ask, and one of JSON.

    Ray has no public way to ask. Where a newer Ray keeps these functions elsewhere, nothing is known of the head.
    """
    try:
        from ray._common.usage.usage_lib import get_cluster_metadata
        from ray._private.services import canonicalize_bootstrap_address
        from ray._raylet import GcsClient  # type: ignore[attr-defined]
    except ImportError:
        print("not asking\n{}")
        return
    print("asking", flush=True)
    found = get_cluster_metadata(GcsClient(address=canonicalize_bootstrap_address(sys.argv[1]))) or {}
    print(json.dumps({name: str(found.get(name, "")) for name in ("ray_version", "python_version")}))


def _require_same(address: str, there: dict[str, str]) -> None:
    here = {"ray_version": metadata.version("ray"), "python_version": platform.python_version()}
    for name, what, parts in (("ray_version", "Ray", 3), ("python_version", "Python", 2)):
        theirs, ours = there.get(name), here[name]
        if theirs and theirs.split(".")[:parts] != ours.split(".")[:parts]:
            raise ClusterError(
                f"the Ray cluster at {address} runs {what} {theirs}, this process {ours}: both must be the same "
                f"(install {what} {theirs} here, or start the cluster from this environment)"
            )
