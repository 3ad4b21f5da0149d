"""What `tessera doctor` looks at before a long run: each check is ok, a warning or a failure, with its remedy."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import TesseraError
from pipeline.run import cluster, tracking
from pipeline.run.display import size

if TYPE_CHECKING:
    from pipeline.store.store import ArtifactStore

OK, WARN, FAIL = "ok", "warn", "fail"
RAY_SECONDS = 90.0  # a local Ray takes 6-8 s; a check must not wait longer for a cluster that hangs
LOW_DISK, NO_DISK = 20 * cluster.GIB, 1 * cluster.GIB
LOW_MEMORY = 8 * cluster.GIB  # what the quickstart stays under
OPEN_FILES = 4096
# Older versions lack something that Tessera relies on, or are unsafe (mlflow: path traversal, CVE-2026-53995).
OLDEST = {"ray": (2, 60), "mlflow": (3, 17, 2), "torch": (2, 10), "opencv-contrib-python-headless": (5,), "timm": (1,)}
CLASHES = (
    ("faiss-cpu", "faiss-gpu"),
    ("opencv-contrib-python-headless", "opencv-python"),
    ("opencv-contrib-python-headless", "opencv-python-headless"),
)


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    state: str
    detail: str
    remedy: str = ""

    def to_json(self) -> dict[str, str]:
        """One entry of `checks` in what `tessera doctor --json` prints."""
        return asdict(self)


def examine(store: ArtifactStore, tracking_uri: str | None, address: str | None) -> Iterator[Check]:
    """All checks, the quick ones first. None of them raises, and none of them hangs.

    Args:
        store: to write to.
        tracking_uri: to write to; None when runs are not tracked.
        address: of the Ray cluster; None for a local Ray.
    """
    checks: list[Callable[[], Iterator[Check]]] = [
        _versions,
        _clashes,
        _memory,
        _open_files,
        lambda: _store(store),
        lambda: _spill(),
        _environment,
        lambda: _tracking(tracking_uri),
        lambda: _ray(address),
    ]
    for check in checks:
        try:
            yield from check()
        except Exception as error:
            yield Check(check.__name__.strip("_<>"), FAIL, f"{type(error).__name__}: {error}", "see the message")


def _versions() -> Iterator[Check]:
    yield Check("python", OK, sys.version.split()[0])
    for name, oldest in OLDEST.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Check(name, FAIL, "not installed", "run `make setup`")
            continue
        wanted = ".".join(map(str, oldest))
        old = tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < oldest
        yield Check(name, FAIL if old else OK, version, f"needs {wanted} or newer: run `make setup`" if old else "")


def _clashes() -> Iterator[Check]:
    installed = {(dist.name or "").lower() for dist in metadata.distributions()}
    for first, second in CLASHES:
        if first in installed and second in installed:
            yield Check("packages", WARN, f"{first} and {second} overwrite each other's files", f"uninstall {second}")
    if not installed & {"faiss-cpu", "faiss-gpu"}:
        yield Check("faiss", FAIL, "not installed", "install the extra `cpu` or `gpu`: make setup FAISS=cpu")


def _memory() -> Iterator[Check]:
    limit = cluster.memory_limit()
    low = limit < LOW_MEMORY
    yield Check("memory", WARN if low else OK, size(limit), "lower batch_size and resources.workers" if low else "")
    shared = Path("/dev/shm")
    if shared.is_dir():
        free, wanted = shutil.disk_usage(shared).free, cluster.object_store_bytes()
        small = free < wanted
        remedy = "give the container more shared memory (docker: --shm-size=2g), or Ray's objects lie on disk"
        detail = f"{size(free)} free, Ray's object store takes up to {size(wanted)}"
        yield Check("shared memory", WARN if small else OK, detail, remedy if small else "")


def _open_files() -> Iterator[Check]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= soft < OPEN_FILES
    yield Check("open files", WARN if few else OK, f"limit {soft}", f"ulimit -n {OPEN_FILES}" if few else "")


def _store(store: ArtifactStore) -> Iterator[Check]:
    try:
        store.probe_writable()
        yield Check("store", OK, f"{store.address}: written, read back and deleted")
    except TesseraError as error:
        yield Check("store", FAIL, str(error), "check the address, its permissions and credentials")
    if (free := store.free_bytes()) is not None:
        yield _disk("store disk", free, store.address, "`tessera artifacts gc` removes what is unused")


def _spill() -> Iterator[Check]:
    try:
        folder = cluster.temp_dir()
    except TesseraError as error:
        yield Check("spill disk", FAIL, str(error), "set RAY_TMPDIR to a short path")
        return
    base = folder if folder.exists() else folder.parent
    remedy = "set RAY_TMPDIR to a disk with room: Ray's logs and spilled objects go there"
    yield _disk("spill disk", shutil.disk_usage(base).free, str(folder), remedy)


def _disk(name: str, free: int, place: str, remedy: str) -> Check:
    state = FAIL if free < NO_DISK else WARN if free < LOW_DISK else OK
    return Check(name, state, f"{size(free)} free at {place}", "" if state == OK else remedy)


def _environment() -> Iterator[Check]:
    uploads = os.environ.get("RAY_ENABLE_UV_RUN_RUNTIME_ENV") == "1"
    yield Check(
        "uv run",
        WARN if uploads else OK,
        "Ray re-creates the driver's environment in every worker"
        if uploads
        else "workers use this environment as it is",
        "unset RAY_ENABLE_UV_RUN_RUNTIME_ENV: it uploads the working folder" if uploads else "",
    )
    phones = [
        name
        for name, quiet in (("RAY_USAGE_STATS_ENABLED", "0"), ("MLFLOW_DISABLE_TELEMETRY", "true"))
        if os.environ.get(name, quiet).lower() not in (quiet, {"0": "false", "true": "1"}[quiet])
    ]
    told = f"turned on by {' and '.join(phones)}" if phones else "off for Ray and MLflow"
    yield Check("usage statistics", WARN if phones else OK, told, f"unset {' '.join(phones)}" if phones else "")


def _tracking(uri: str | None) -> Iterator[Check]:
    if uri is None:
        yield Check("tracking", WARN, "off", "set `tracking:` in the pipeline to keep a history of runs")
        return
    try:
        uri = tracking.absolute_uri(uri)
        tracking.try_out(uri)
        yield Check("tracking", OK, f"{tracking.masked(uri)}: reachable and writable")
    except Exception as error:  # whatever MLflow and its back-ends raise is the finding
        reason = " ".join(str(error).split())[:200]
        remedy = "start the server or correct `tracking:`; a run goes on without it"
        yield Check("tracking", FAIL, f"{tracking.masked(uri)}: {type(error).__name__}: {reason}", remedy)


def _ray(address: str | None) -> Iterator[Check]:
    """Start or join Ray in another process, which can be ended when it hangs."""
    command = [sys.executable, "-c", "from pipeline.run.doctor import _ray_probe; _ray_probe()", address or ""]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        output, errors = process.communicate(timeout=RAY_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()  # its local Ray ends with it
        process.communicate()
        remedy = "check --address and RAY_ADDRESS; for a local Ray see its logs under the spill folder"
        yield Check("ray cluster", FAIL, f"no answer within {RAY_SECONDS:.0f} s", remedy)
        return
    if process.returncode != 0:
        last = errors.strip().splitlines()[-1:] or ["it ended without a word"]
        yield Check("ray cluster", FAIL, last[0], "see the message")
        return
    seen: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    yield Check("ray cluster", OK, f"{seen['cluster']}")
    gpus, usable = seen["gpus"], seen["torch_gpus"]
    if gpus or usable:
        fits = bool(gpus) == bool(usable) or seen["remote"]
        detail = f"Ray sees {gpus:g}, torch {usable}"
        yield Check("gpus", OK if fits else WARN, detail, "" if fits else "install torch's build for this driver")
    else:
        yield Check("gpus", OK, "none: everything runs on CPUs")


def _ray_probe() -> None:
    """What the process that `_ray` starts does: print one line of JSON."""
    try:
        joined = cluster.start(sys.argv[1] or None)
    except TesseraError as error:
        sys.exit(str(error))
    cluster.stop(joined)
    import torch

    answer = {
        "cluster": str(joined),
        "gpus": joined.gpus,
        "torch_gpus": torch.cuda.device_count(),
        "remote": joined.session is None,
    }
    print(json.dumps(answer))
