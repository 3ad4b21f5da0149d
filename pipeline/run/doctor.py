"""What `tessera doctor` looks at before a long run: each check is ok, a warning or a failure, with its remedy."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, TesseraError
from pipeline.plan.plan import Plan, make_plan
from pipeline.run import capacity, cluster, tracking
from pipeline.run.capacity import Machine, Place
from pipeline.run.display import size

if TYPE_CHECKING:
    from pipeline.config.load import Pipeline
    from pipeline.store.store import ArtifactStore

OK, WARN, FAIL = "ok", "warn", "fail"
RAY_SECONDS = 60.0  # a local Ray takes 6-8 s, several times that on a busy machine
PLAN_SECONDS = 6.0  # what a plan may take here; it takes longer only to read a source for the first time
ANSWER_SECONDS = 5.0  # of a tracking server
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


def examine(
    store: ArtifactStore, tracking_uri: str | None, address: str | None, pipeline: Pipeline | None = None
) -> Iterator[Check]:
    """All checks, the quick ones first. None of them raises, none hangs, and nothing is left behind.

    Args:
        store: to write to.
        tracking_uri: where runs would be tracked; None when they are not.
        address: of the Ray cluster; None for a local Ray.
        pipeline: whose run is prepared: its stages are held against this machine, and against the cluster.
    """
    asked = _ask_ray(address)  # Ray takes its seconds while the other checks are made
    planned: list[Plan] = []
    checks: list[Callable[[], Iterator[Check]]] = [
        _versions,
        _clashes,
        _memory,
        _open_files,
        partial(_store, store),
        _spill,
        _environment,
        partial(_tracking, tracking_uri),
    ]
    if pipeline is not None:
        checks += [partial(_plan, pipeline, store, planned), partial(_start, pipeline, planned)]
    checks.append(partial(_ray, asked, pipeline, planned))
    try:
        for check in checks:
            try:
                yield from check()
            except Exception as error:
                name = getattr(check, "func", check).__name__.strip("_")
                yield Check(name, FAIL, f"{type(error).__name__}: {error}", "see the message")
    finally:
        asked.kill()
        asked.communicate()


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
        with _only_empty_folders_removed(store.objects.folder):
            store.probe_writable()
        yield Check("store", OK, f"{store.address}: written, read back and deleted")
    except TesseraError as error:
        yield Check("store", FAIL, str(error), "check the address, its permissions and credentials")
    if (free := store.free_bytes()) is not None:
        yield _disk("store disk", free, store.address, "`tessera artifacts gc` removes what is unused")


@contextlib.contextmanager
def _only_empty_folders_removed(folder: Path | None) -> Iterator[None]:
    """Remove the folders that are made meanwhile for a local store, as long as nobody puts anything into them."""
    new = [path for path in (folder / ".tessera", folder, *folder.parents) if not path.exists()] if folder else []
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for path in new:
                path.rmdir()


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
    """Whether runs can be tracked, asked without MLflow, which would make a database or an experiment."""
    if uri is None:
        yield Check("tracking", WARN, "off", "set `tracking:` in the pipeline to keep a history of runs")
        return
    try:
        uri = tracking.absolute_uri(uri)
        database = tracking.database_file(uri)
        if database is not None:
            how = _try_database(database)
        elif uri.startswith("http"):
            how = _try_server(uri)
        else:
            tracking.probe(uri)
            how = "reachable"
        yield Check("tracking", OK, f"{tracking.masked(uri)}: {how}")
    except Exception as error:  # whatever a back-end raises is the finding
        reason = tracking.scrubbed(str(error), uri)[:200]
        remedy = "start the server or correct `tracking:`; a run goes on without it"
        if isinstance(error, urllib.error.HTTPError) and error.code in (401, 403):
            remedy = tracking.CREDENTIALS
        yield Check("tracking", FAIL, f"{tracking.masked(uri)}: {type(error).__name__}: {reason}", remedy)


def _try_database(file: Path) -> str:
    if not file.exists():
        folder = next(parent for parent in file.parents if parent.exists())
        with tempfile.TemporaryFile(dir=folder):
            return "the first run makes it"
    with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=rw", uri=True, timeout=2.0)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.rollback()
    return "readable and writable"


def _try_server(uri: str) -> str:
    request = urllib.request.Request(f"{tracking.anonymous(uri)}/api/2.0/mlflow/experiments/search?max_results=1")
    if word := tracking.authorization(uri):
        request.add_header("Authorization", word)
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
        json.loads(answer.read())
    return "reachable, and answers as MLflow"


def _plan(pipeline: Pipeline, store: ArtifactStore, planned: list[Plan]) -> Iterator[Check]:
    """What `tessera plan` would say; nothing is written. Appends the plan."""
    problems: list[TesseraError] = []

    def make() -> None:
        try:
            planned.append(make_plan(pipeline, store, remember=False))
        except TesseraError as error:
            problems.append(error)

    making = threading.Thread(target=make, daemon=True)
    making.start()
    making.join(PLAN_SECONDS)
    if making.is_alive():
        remedy = "`tessera plan` reads it, once, and says the rest"
        yield Check("plan", WARN, "a source has to be read first, which takes longer than this check", remedy)
    for error in problems:
        yield from _problems("plan", error)
    if planned:
        count = len(planned[0].to_run)
        yield Check("plan", OK, f"{count} stages to run, {len(planned[0].stages) - count} cached")


def _start(pipeline: Pipeline, planned: list[Plan]) -> Iterator[Check]:
    """What would stop a stage of the plan on this machine: its weights, its resources."""
    for stage in planned[0].to_run if planned else ():
        entry = pipeline.stages[stage.name].stage
        found = [
            pipeline.problem(f"stages.{stage.name}.{path}", what, remedy)
            for path, what, remedy in entry.obstacles(lambda text: None)
        ]
        if not entry.uses_ray:
            here = Place("this machine", [capacity.this_machine()])
            found += capacity.lacking(pipeline, [stage.name], here)
        for problem in found:
            yield Check("start", FAIL, str(replace(problem, remedy="")), problem.remedy or "see the message")


def _problems(name: str, error: TesseraError) -> Iterator[Check]:
    for problem in error.problems if isinstance(error, ConfigError) else ():
        yield Check(name, FAIL, str(replace(problem, remedy="")), problem.remedy or "correct the pipeline file")
    if not isinstance(error, ConfigError):
        yield Check(name, FAIL, str(error), "see the message")


def _ask_ray(address: str | None) -> subprocess.Popen[str]:
    """Start or join Ray in another process, which can be ended when it hangs."""
    command = [sys.executable, "-c", "from pipeline.run.doctor import _ray_probe; _ray_probe()", address or ""]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _ray(asked: subprocess.Popen[str], pipeline: Pipeline | None, planned: list[Plan]) -> Iterator[Check]:
    try:
        output, errors = asked.communicate(timeout=RAY_SECONDS)
    except subprocess.TimeoutExpired:
        asked.kill()  # its local Ray ends with it
        asked.communicate()
        remedy = "check --address and RAY_ADDRESS; for a local Ray see its logs under the spill folder"
        yield Check("ray cluster", FAIL, f"no answer within {RAY_SECONDS:g} s", remedy)
        return
    if asked.returncode != 0:
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
    if pipeline is not None and planned:
        names = [stage.name for stage in planned[0].to_run if pipeline.stages[stage.name].stage.uses_ray]
        most = Machine(*seen["most"]) if seen["most"] else None
        place = Place(seen["where"], [Machine(*machine) for machine in seen["machines"]], most)
        lacking = list(capacity.lacking(pipeline, names, place))
        for problem in lacking:
            yield Check("resources", FAIL, str(replace(problem, remedy="")), problem.remedy)
        demands = [capacity.demand_of(pipeline, name, seen["gpus"]) for name in names]
        growing = [demand for demand in demands if demand is not None and not demand.fits(place.machines)]
        for demand in growing if not lacking else ():
            remedy = f"the autoscaler must add nodes: the stage waits up to {cluster.GROWTH_SECONDS / 60:g} minutes"
            yield Check("resources", WARN, place.short_of(demand), remedy)
        if not lacking and not growing:
            yield Check("resources", OK, f"{place.name} has what every stage asks for")


def _ray_probe() -> None:
    """What the process that `_ask_ray` starts does: print one line of JSON."""
    try:
        joined = cluster.start(sys.argv[1] or None)
    except TesseraError as error:
        sys.exit(str(error))
    cluster.stop(joined)
    usable = 0
    if joined.gpus or capacity.visible_gpus() != 0:  # without a device torch need not be imported
        import torch

        usable = torch.cuda.device_count()
    answer = {
        "cluster": str(joined),
        "where": joined.where,
        "gpus": joined.gpus,
        "torch_gpus": usable,
        "remote": joined.session is None,
        "machines": [(machine.cpus, machine.gpus) for machine in joined.machines],
        "most": (joined.most.cpus, joined.most.gpus) if joined.most else None,
    }
    print(json.dumps(answer))
