"""A Ray cluster of several nodes on this machine, for tests: its nodes are killed and started again one by one.

Each node has its own loopback address, ports, folder and number of CPUs; all share a token. Nodes end by the ids of
their processes, never by `ray stop`, which would end every Ray of the machine. Needs Linux: there, all of 127.0.0.0/8
is this machine. (127.0.0.1 is left out: Ray replaces it by an address that other machines can reach.)
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

START_SECONDS = 180.0
STARTS = 3  # Ray gives up when one of its agents needs more than 15 s to start, as on a busy machine it may
# With Ray's own niceness, workers would wait for all other processes of a busy machine.
QUIET = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25"}

AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # parts of a node that are titled like workers


@dataclass
class Node:
    """One node: what it is started with, and its processes while it runs."""

    host: str
    cpus: int
    folder: Path  # of Ray's sockets and logs
    environment: Mapping[str, str] = field(default_factory=dict)
    cores: str | None = None  # as taskset takes them
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """What `ray start` has printed, all starts one after the other."""
        return self.folder / "start.log"

    @property
    def running(self) -> bool:
        """Whether its `ray start`, which ends when a part of the node has ended, is there."""
        return self.process is not None and self.process.poll() is None

    def processes(self) -> list[psutil.Process]:
        """All processes of the node: the Ray parts, workers, and what these have started."""
        if self.process is None:
            return []
        try:
            first = psutil.Process(self.process.pid)
            return [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def raylet(self) -> psutil.Process | None:
        """The process that starts the workers of the node."""
        return next((process for process in self.processes() if title_of(process).endswith("/raylet")), None)

    def workers(self, name: str = "") -> list[psutil.Process]:
        """Ray workers whose title has `name`: of a task its function, of an actor its class; "" gives all."""
        titles = {process: title_of(process) for process in self.processes()}
        return [
            process
            for process, title in titles.items()
            if title.startswith("ray::") and title not in AGENTS and name in title
        ]

    def kill(self) -> None:
        """`kill -9` of all its processes at once, as when the machine loses its power."""
        stopped: set[int] = set()
        while new := [process for process in self.processes() if process.pid not in stopped]:
            for process in new:  # a stopped process starts no others
                stopped.add(process.pid)
                _send(process, signal.SIGSTOP)
        everything = self.processes()
        for process in everything:
            _send(process, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
        psutil.wait_procs(everything, timeout=30)
        self.process = None


class Cluster:
    """A head (node 0) and further nodes.

    Args:
        cpus: of each node, the head's first.
        environment: of all nodes, beside this process's; jobs and workers inherit it.
        environments: of single nodes, beside `environment`; by node number.
        cores: that a node is bound to, as taskset takes them; by node number.
        dashboard: whether the head takes jobs (three more processes).
    """

    def __init__(
        self,
        cpus: Sequence[int],
        environment: Mapping[str, str] | None = None,
        environments: Mapping[int, Mapping[str, str]] | None = None,
        cores: Mapping[int, str] | None = None,
        *,
        dashboard: bool = True,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tc", dir="/tmp"))  # short: Ray puts sockets into it
        self.token = secrets.token_hex(32)
        self.dashboard = dashboard
        self._hosts = secrets.randbelow(200) + 20  # clusters that run at the same time do not share addresses
        self._port, self._dashboard_port, self._client_port = (free_port(self._host(0)) for _ in range(3))
        self.nodes = []
        for number, count in enumerate(cpus):
            folder = self.folder / str(number)
            folder.mkdir()
            own = {**QUIET, **self.tokens, **(environment or {}), **(environments or {}).get(number, {})}
            self.nodes.append(Node(self._host(number), count, folder, own, (cores or {}).get(number)))

    def _host(self, number: int) -> str:
        return f"127.0.{self._hosts}.{number + 2}"

    @property
    def address(self) -> str:
        """Where drivers join: `tessera run --address`."""
        return f"{self._host(0)}:{self._port}"

    @property
    def jobs_address(self) -> str:
        """Where jobs are sent: `tessera submit --address`."""
        return f"http://127.0.0.1:{self._dashboard_port}"

    @property
    def tokens(self) -> dict[str, str]:
        """The environment that a driver or submitter needs."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def start(self) -> None:
        """Start the head, then the others at the same time."""
        self._start([0])
        self._start(list(range(1, len(self.nodes))))

    def kill_node(self, number: int) -> None:
        """`kill -9` of everything on a node. The head misses its heartbeats, by default after about 20 s."""
        self.nodes[number].kill()

    def restart_node(self, number: int) -> None:
        """Start a node again, or for the first time; one that still runs is killed before."""
        self.nodes[number].kill()
        self._start([number])

    def kill_head(self) -> None:
        """`kill -9` of everything on the head, with the drivers of jobs that run there."""
        self.nodes[0].kill()

    def restart_head(self) -> None:
        """Start a head on the same ports, and the nodes anew: a head knows nothing of what was before it."""
        for node in self.nodes:
            node.kill()
        self.start()

    def workers(self, name: str = "", number: int | None = None) -> list[psutil.Process]:
        """Ray workers whose title has `name`, on one node or on all."""
        nodes = self.nodes if number is None else [self.nodes[number]]
        return [process for node in nodes for process in node.workers(name)]

    def wait_for_worker(self, name: str, number: int | None = None, seconds: float = 120) -> psutil.Process:
        """The first worker with this in its title, as soon as there is one.

        Raises:
            TimeoutError: there is none within `seconds`.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := self.workers(name, number):
                return found[0]
            time.sleep(0.05)
        where = "any node" if number is None else f"node {number}"
        raise TimeoutError(f"no worker {name!r} on {where} within {seconds:g} s")

    def stop(self, *, keep_logs: bool = False) -> None:
        """End all nodes and delete their folders."""
        for node in self.nodes:
            node.kill()
        if not keep_logs:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, numbers: Sequence[int]) -> None:
        waiting = list(numbers)
        for _ in range(STARTS):
            offsets = {number: self._launch(number) for number in waiting}
            end = time.monotonic() + START_SECONDS
            waiting = [number for number in waiting if not self._came_up(number, offsets[number], end)]
            if not waiting:
                return
            for number in waiting:
                self.nodes[number].kill()
        raise RuntimeError(f"Ray does not start:\n{self.nodes[waiting[0]].log.read_text()[-3000:]}")

    def _launch(self, number: int) -> int:
        node = self.nodes[number]
        offset = node.log.stat().st_size if node.log.exists() else 0
        with node.log.open("ab") as log:
            node.process = subprocess.Popen(
                self._command(number),
                env={**os.environ, **node.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the test
            )
        return offset

    def _command(self, number: int) -> list[str]:
        node = self.nodes[number]
        command = ["taskset", "--cpu-list", node.cores] if node.cores else []
        command += [str(Path(sys.executable).parent / "ray"), "start", "--block", f"--node-ip-address={node.host}"]
        command += [f"--num-cpus={node.cpus}", "--num-gpus=0", "--object-store-memory=100000000"]
        # Ports that the system picks: several clusters may run on this machine.
        command += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
        command += [f"--temp-dir={node.folder}", "--disable-usage-stats", "--include-log-monitor=false"]
        if number:
            return [*command, f"--address={self.address}"]
        command += ["--head", "--no-monitor", f"--port={self._port}", f"--ray-client-server-port={self._client_port}"]
        command += [f"--include-dashboard={str(self.dashboard).lower()}", "--dashboard-host=127.0.0.1"]
        return [*command, f"--dashboard-port={self._dashboard_port}"]

    def _came_up(self, number: int, offset: int, end: float) -> bool:
        node = self.nodes[number]
        while time.monotonic() < end and node.running:
            with node.log.open("rb") as log:
                log.seek(offset)
                if b"Ray runtime started" in log.read():
                    return True
            time.sleep(0.1)
        return False


@contextlib.contextmanager
def started_cluster(
    cpus: Sequence[int],
    environment: Mapping[str, str] | None = None,
    environments: Mapping[int, Mapping[str, str]] | None = None,
    cores: Mapping[int, str] | None = None,
    *,
    dashboard: bool = True,
) -> Iterator[Cluster]:
    """A running `Cluster`, ended afterwards. The arguments are its."""
    cluster = Cluster(cpus, environment, environments, cores, dashboard=dashboard)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def title_of(process: psutil.Process) -> str:
    """What a process calls itself; Ray's workers say what they run."""
    try:
        command = process.cmdline()
    except psutil.Error:
        return ""
    return command[0] if command else ""


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
