"""Ray for a run: starts a local one, or joins the cluster at an address. The only file that calls `ray.init`.

What a local Ray inherits is decided here, before Ray is imported. It does not re-create the driver's `uv run`
environment (for that it would upload the working folder with its data to every worker), sends no usage statistics,
has no dashboard, and keeps a bounded object store. Its temporary folder has a short path, because paths of Unix
sockets are limited to 107 bytes, and its access token is valid for this run only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ClusterError
from pipeline.run import head
from pipeline.run.capacity import Demand, Machine, Place
from pipeline.run.head_watch import HeadWatch
from pipeline.share import Share, nodes, nodes_by_id, own_node

GIB = 1 << 30
OBJECT_STORE_LIMIT = 2 * GIB  # shards travel through it a few at a time; the rest of the memory belongs to the stages
OBJECT_STORE_SHARE = 0.3
LONGEST_TEMP_DIR = 60  # Ray adds about 45 bytes of session and socket names to it, and the limit is 107
GROWTH_SECONDS = 900.0  # how long a stage waits for an autoscaling cluster
# Ray gives up when one of its agents needs more than 15 s to start, which cannot be configured. A busy machine may need
# that long the first time, when the agents' code has to be read from disk.
LOCAL_STARTS = 3
LEAST_DISK = 16 << 20  # bytes for Ray's own files; logs and spilled objects take more
KEEP_LOGS_SECONDS = 24 * 3600.0

# Set unless the user has set them: Ray reads them when it is imported, and its workers inherit them.
QUIET = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "WARNING",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # with Ray's own 15, workers wait for every other process of a busy machine
    "RAY_DISABLE_IMPORT_WARNING": "1",
    # In a Ray worker, glibc's malloc returns every image-sized buffer to the system, and the page faults that follow
    # take a tenth of selective search's time. A plain process adapts by itself. Bytes, read when a process starts.
    "MALLOC_MMAP_THRESHOLD_": str(64 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
    "MALLOC_TOP_PAD_": str(16 << 20),
}
# The same for a Ray that this process starts. Ray Train's controller reads them, and hands them to its workers.
QUIET_LOCAL = {
    # Ray Train takes one report of a checkpoint each time it looks at its workers: at its own 2 s, a small training
    # that saves twenty checkpoints waits for 40 s.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # One more process, 4 s of a CPU in the seconds before the first step, that waits for other nodes to go away.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


@dataclass(frozen=True)
class Cluster:
    """The Ray that this process is connected to. `session` is the folder of a local Ray, removed by `stop`."""

    address: str  # "local", or host:port of the cluster that was joined
    cpus: float
    gpus: float
    nodes: int
    session: Path | None = None
    machines: tuple[Machine, ...] = ()
    most: Machine | None = None  # what an autoscaling cluster can grow to; None for one that does not grow
    borrowed: bool = False  # this process was connected before: it stays so
    watch: HeadWatch | None = None  # of a cluster that was joined

    def __str__(self) -> str:
        return f"{self.where} with {self.cpus:g} CPUs and {self.gpus:g} GPUs"

    @property
    def where(self) -> str:
        """What to call it."""
        return "a local Ray" if self.address == "local" else f"the Ray cluster at {self.address} ({self.nodes} nodes)"

    def there(self) -> Share:
        """Its nodes as they are now, by id."""
        return nodes_by_id()

    def own_node(self) -> str:
        """The id of the node that this process is on."""
        return own_node()

    @property
    def place(self) -> Place:
        """It as a place for stages to run."""
        return Place(self.where, self.machines, self.most)

    def wait_for(self, demand: Demand, say: Callable[[str], None]) -> None:
        """Wait until an autoscaling cluster has grown to what a stage needs.

        Raises:
            ClusterError: it has not within GROWTH_SECONDS.
        """
        if demand.fits(self.machines):
            return
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group

        say(f"{self.place.short_of(demand)}: waiting up to {GROWTH_SECONDS / 60:g} minutes for the cluster to grow")
        bundle = {name: amount for name, amount in (("CPU", demand.cpus), ("GPU", demand.gpus)) if amount}
        group = placement_group([bundle] * demand.workers)
        try:
            ray.get(group.ready(), timeout=GROWTH_SECONDS)
        except ray.exceptions.GetTimeoutError as error:
            raise ClusterError(
                f"resources: {self.place.short_of(demand)}, and did not grow within {GROWTH_SECONDS / 60:g} minutes "
                "(look at `ray status`, or lower resources.cpus, resources.gpus or resources.workers)"
            ) from error
        finally:
            remove_placement_group(group)


def start(address: str | None = None) -> Cluster:
    """Join the cluster at `address` (or `RAY_ADDRESS`), or start a local Ray that ends with this process.

    A process that is connected to Ray already (a sweep, one of its trials) goes on with that one.

    Raises:
        ClusterError: the address does not answer, or Ray does not start.
    """
    if (connected := _connected()) is not None:
        return connected
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    prepare_environment()
    if address == "local":
        options = _local_options()
    else:
        options = {"address": head.joinable(address)}
    import ray

    try:
        with _own_sigterm():
            context = _connect(options, attempts=LOCAL_STARTS if address == "local" else 1)
        session = Path(context.address_info["session_dir"]) if address == "local" else None
        machines = _machines()
        most = None if address == "local" else _most()
    except Exception as error:
        with contextlib.suppress(Exception):
            ray.shutdown()
        raise ClusterError(_explain(address, error)) from error
    # The run's own bars show the progress; Ray warns in every process that its bars are off.
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    cpus, gpus = sum(machine.cpus for machine in machines), sum(machine.gpus or 0.0 for machine in machines)
    watch = None
    if address != "local":
        watch = HeadWatch(context.address_info["gcs_address"])
        watch.start()
    return Cluster(address, cpus, gpus, len(machines), session, machines, most, watch=watch)


def _connected() -> Cluster | None:
    """The Ray that this process is connected to; asks without importing Ray."""
    if "ray" not in sys.modules:
        return None
    import ray

    if not ray.is_initialized():
        return None
    machines = _machines()
    cpus, gpus = sum(machine.cpus for machine in machines), sum(machine.gpus or 0.0 for machine in machines)
    address = ray.get_runtime_context().gcs_address
    return Cluster(address, cpus, gpus, len(machines), None, machines, _most(), borrowed=True)


def _machines() -> tuple[Machine, ...]:
    return tuple(Machine(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes())


def _most() -> Machine | None:
    """What an autoscaler may bring the cluster to; None where there is none.

    Ray Train and Ray Data look here too, but Ray has no public function for it.
    """
    with contextlib.suppress(Exception):  # another version of Ray: as if the cluster did not grow
        from ray._private.state import state

        found = state.get_max_resources_from_cluster_config()
        return Machine(float(found.get("CPU", 0)), float(found.get("GPU", 0))) if found else None
    return None


def _connect(options: dict[str, object], *, attempts: int) -> Any:
    """`ray.init`, tried again when Ray did not start within the time that it allows itself."""
    import ray

    while True:
        attempts -= 1
        try:
            return ray.init(namespace="tessera", log_to_driver=False, logging_level=logging.ERROR, **options)
        except Exception as error:
            if attempts < 1 or "timed out" not in str(error):
                raise
            ray.shutdown()


def stop(cluster: Cluster, *, keep_logs: bool = False) -> None:
    """Leave the cluster. A local Ray ends, and its session folder is deleted unless its logs may explain a failure."""
    if cluster.borrowed:
        return
    import ray

    if cluster.watch is not None:
        cluster.watch.stop()
    ray.shutdown()
    if cluster.session is not None and not keep_logs:
        shutil.rmtree(cluster.session, ignore_errors=True)


def prepare_environment() -> None:
    """Set what Ray reads from the environment; call it before anything imports ray."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # Ray does not turn token authentication on for an explicit address; a token in the environment says that it should.
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def memory_limit() -> int:
    """Bytes of memory this process may use: the machine's, or its control group's where that is less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            return min(physical, int(Path(file).read_text()))
    return physical


def object_store_bytes() -> int:
    """What a local Ray may keep in shared memory; the rest spills to disk."""
    return int(min(OBJECT_STORE_LIMIT, OBJECT_STORE_SHARE * memory_limit()))


def temp_dir() -> Path:
    """This user's folder for Ray's sockets, logs and spilled objects, below `RAY_TMPDIR` or /tmp.

    Raises:
        ClusterError: the path is too long for a Unix socket.
    """
    base = Path(os.environ.get("RAY_TMPDIR") or ("/tmp" if sys.platform != "win32" else tempfile.gettempdir()))
    folder = base.absolute() / f"tessera-{os.getuid()}"
    if len(os.fsencode(folder)) > LONGEST_TEMP_DIR:
        raise ClusterError(
            f"Ray's temporary folder {folder} is too long for Unix sockets (set RAY_TMPDIR to a shorter one)"
        )
    return folder


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's handler of SIGTERM, which Ray replaces by its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if callable(handler):
        signal.signal(signal.SIGTERM, handler)


def _remove_remains(folder: Path) -> None:
    """Clear sessions of runs that were killed: delete spilled objects at once, and logs after a day."""
    import psutil

    for session in folder.glob("session_*_*"):
        pid = session.name.rpartition("_")[2]
        if session.is_symlink() or not pid.isdigit() or psutil.pid_exists(int(pid)):
            continue
        with contextlib.suppress(OSError):
            old = time.time() - session.stat().st_mtime > KEEP_LOGS_SECONDS
            for remains in [session] if old else session.glob("ray_spilled_objects*"):
                shutil.rmtree(remains, ignore_errors=True)


def _local_options() -> dict[str, object]:
    for name, value in QUIET_LOCAL.items():
        os.environ.setdefault(name, value)
    folder = temp_dir()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ClusterError(
            f"Ray's temporary folder {folder} cannot be made: {error} (set RAY_TMPDIR to a writable place)"
        ) from error
    _remove_remains(folder)
    if (free := shutil.disk_usage(folder).free) < LEAST_DISK:  # Ray would try for half a minute, and name a file
        raise ClusterError(
            f"Ray's temporary folder {folder} is on a full disk: {free >> 20} MiB free, at least {LEAST_DISK >> 20} "
            "MiB needed (free space there, or set RAY_TMPDIR to a disk with room)"
        )
    # Without this Ray would leave a token in the user's home, and fail where the home is read-only.
    if "RAY_AUTH_MODE" not in os.environ and not (Path.home() / ".ray" / "auth_token").exists():
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    return {
        "address": "local",
        "include_dashboard": False,
        "object_store_memory": object_store_bytes(),
        "_temp_dir": str(folder),
    }


def _explain(address: str, error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    if address == "local":
        return f"a local Ray does not start: {text} (`tessera doctor` says what is missing)"
    if "auth" in text.lower() or "token" in text.lower():
        return (
            f"the Ray cluster at {address} refused us: {text} "
            "(set RAY_AUTH_MODE=token and the cluster's RAY_AUTH_TOKEN)"
        )
    return (
        f"the Ray cluster at {address} cannot be joined: {text} (this machine must run one of its nodes: "
        f"`ray start --address {address}`; where it uses tokens, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN)"
    )
