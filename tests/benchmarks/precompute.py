"""selective_search and superpixels on Ray Data against a multiprocessing.Pool that calls the same function.

    python -m tests.benchmarks.precompute [--stage superpixels] [--images 1000] [--rounds 3]

Both sides use one process per CPU, both are warm before the clock runs, and rounds alternate, so that what else the
machine does meets both. The pool reads files and drops its rows; the stage's map reads and writes shards of artifacts.
CPU seconds (workers, driver, and Ray's daemons on Ray's side) depend less on who else uses the machine.
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import psutil
import pyarrow as pa

from pipeline.run import cluster
from pipeline.stage import Context, Resources
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data.tables import SCHEMAS
from stages.ingest.write import default_shard_rows
from stages.map_images.ray_data import map_images
from stages.regions.proposals import propose_row
from stages.regions.segments import segment_row
from stages.regions.selective_search import SelectiveSearch
from stages.regions.superpixels import Superpixels
from tests.benchmarks.images import find_images
from tests.benchmarks.results import write_section

TITLE = "Precompute: Ray Data against multiprocessing.Pool"
NOTE = """Target: at least 0.9. Images of data/objects (224 px; 3000, repeated above that), one process a CPU, warm.
Speeds are by the clock. CPU seconds depend less on what else the machine does, but Ray's daemons add some with time.
A stage's start costs about a second whatever its size (Ray Data first has to learn what the cluster has).

"""
HEAD = [
    "| stage | round | Pool, images/s | Ray, images/s | Ray / Pool | Pool, CPU s | Ray, CPU s | by CPU |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
]
STAGES: dict[str, tuple[Callable[..., dict[str, Any]], Any, str]] = {
    "selective_search": (propose_row, SelectiveSearch.Config(images="images"), "boxes"),
    "superpixels": (segment_row, Superpixels.Config(images="images"), "superpixels"),
}


def image_files(count: int) -> list[Path]:
    files = find_images("objects", "train/*/*.jpg")
    if count > len(files):
        return (files * -(-count // len(files)))[:count]  # for longer rounds, the same images again
    return files[:: len(files) // count][:count]


def write_images(store: ArtifactStore, files: list[Path], shard_rows: int, fingerprint: str) -> Artifact:
    writer = store.begin("images", fingerprint)
    for index, at in enumerate(range(0, len(files), shard_rows)):
        rows = []
        for image_id, file in enumerate(files[at : at + shard_rows], at):
            row: dict[str, Any] = dict.fromkeys(SCHEMAS["images"].names)
            rows.append(row | {"image_id": image_id, "key": file.name, "image": file.read_bytes()})
        writer.put_table(index, pa.Table.from_pylist(rows, schema=SCHEMAS["images"]))
    return writer.commit()


def from_file(file: Path, process: Callable[..., dict[str, Any]], settings: Any) -> dict[str, Any]:
    return process({"image": file.read_bytes()}, settings)


def one_thread() -> None:
    cv2.setNumThreads(1)


def pool_seconds(pool: Any, work: Callable[[Path], dict[str, Any]], files: list[Path]) -> float:
    start = time.perf_counter()
    rows = sum(1 for _ in pool.imap_unordered(work, files, chunksize=16))
    assert rows == len(files)
    return time.perf_counter() - start


def ray_seconds(store: ArtifactStore, images: Artifact, stage: str) -> float:
    process, settings, kind = STAGES[stage]
    fingerprint = hashlib.sha256(os.urandom(8)).hexdigest()[:12]
    context = Context(stage, fingerprint, {"images": images}, store.begin(kind, fingerprint), Resources())
    start = time.perf_counter()
    summary = map_images(context, images, process, arguments=(settings,), schema=SCHEMAS[kind])
    seconds = time.perf_counter() - start
    assert summary.images == images.rows
    context.output.commit()
    return seconds


def cpu_seconds(pids: Callable[[], list[int]]) -> float:
    total = 0.0
    for pid in pids():
        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def measured(run: Callable[[], float], pids: Callable[[], list[int]]) -> tuple[float, float]:
    """(seconds, CPU seconds) of a run, the latter over the processes it uses."""
    before = cpu_seconds(pids)
    seconds = run()
    return seconds, cpu_seconds(pids) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=list(STAGES), action="append", help="default: both")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--strategy", choices=["single", "fast", "quality"], default="fast", help="of selective search")
    parser.add_argument(
        "--shard-rows", type=int, help="images a shard of the artifact; default: what ingest would choose"
    )
    parser.add_argument("--write", action="store_true", help="put the figures into RESULTS.md")
    options = parser.parse_args()
    propose, _, kind = STAGES["selective_search"]
    search = SelectiveSearch.Config(images="images", strategy=options.strategy)
    STAGES["selective_search"] = (propose, search, kind)
    folder = Path(tempfile.mkdtemp(prefix="tessera-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["TESSERA_CACHE"] = str(folder / "cache")
    files = image_files(options.images)
    store = ArtifactStore(str(folder / "store"))
    shard_rows = options.shard_rows or default_shard_rows(len(files))
    images = write_images(store, files, shard_rows, "0" * 12)
    few = write_images(store, files[:64], 8, "1" * 12)
    started = cluster.start("local")
    workers = int(started.cpus)
    lines: list[str] = []
    print(f"{len(files)} images, {workers} processes on either side, load {os.getloadavg()[0]:.1f}", flush=True)
    try:
        with multiprocessing.get_context("spawn").Pool(workers, one_thread) as pool:
            own = [process.pid for process in multiprocessing.active_children() if process.pid]
            me = psutil.Process()

            def pool_pids() -> list[int]:
                return [me.pid, *own]

            def ray_pids() -> list[int]:
                return [me.pid, *(child.pid for child in me.children(recursive=True) if child.pid not in own)]

            for stage in options.stage or STAGES:
                process, settings, _ = STAGES[stage]
                work = partial(from_file, process=process, settings=settings)
                for _ in range(2):  # warm: all workers of both sides have started and imported what they need
                    pool_seconds(pool, work, files[:64])
                    ray_seconds(store, few, stage)
                wall, cpu = [], []
                for round_ in range(options.rounds):
                    sides = {
                        "pool": (partial(pool_seconds, pool, work, files), pool_pids),
                        "ray": (partial(ray_seconds, store, images, stage), ray_pids),
                    }
                    order = list(sides) if round_ % 2 == 0 else list(sides)[::-1]
                    took = {side: measured(*sides[side]) for side in order}
                    (pool_wall, pool_cpu), (ray_wall, ray_cpu) = took["pool"], took["ray"]
                    wall.append(pool_wall / ray_wall)
                    cpu.append(pool_cpu / ray_cpu)
                    speeds = f"{len(files) / pool_wall:.1f} | {len(files) / ray_wall:.1f} | {wall[-1]:.3f}"
                    lines.append(
                        f"| {stage} | {round_ + 1} | {speeds} | {pool_cpu:.1f} | {ray_cpu:.1f} | {cpu[-1]:.3f} |"
                    )
                    print(lines[-1], f"load {os.getloadavg()[0]:.1f}", flush=True)
                medians = statistics.median(wall), statistics.median(cpu)
                lines.append(f"| **{stage}** | median | | | **{medians[0]:.3f}** | | | **{medians[1]:.3f}** |")
                print(lines[-1], flush=True)
        if options.write:
            command = "python -m tests.benchmarks.precompute " + " ".join(sys.argv[1:])
            write_section(TITLE, command, NOTE + "\n".join([*HEAD, *lines]))
    finally:
        cluster.stop(started)


if __name__ == "__main__":
    main()
