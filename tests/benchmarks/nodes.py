"""What a second node brings, and what a submitted run costs that finds everything cached.

    python -m tests.benchmarks.nodes [--rounds 2]

Nodes are Rays of one CPU on this machine, each bound to a core of its own; the head has no CPU for work. The stages
selective_search (on data/scenes) and superpixels (on the smaller and many more images of data/objects: it is ten times
as fast) run on one node, then on two, from the same cached images into stores of their own.
Then the same pipeline is submitted to the two nodes: every stage is cached, and what is left is the job itself.
Needs two cores that nobody else uses; prints the machine's load, without which the figures mean little.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline.store.store import ArtifactStore
from tests.benchmarks.results import write_section
from tests.cluster import Cluster, started_cluster

ROOT = Path(__file__).resolve().parents[2]
TITLE = "A second node, and a submitted run that is cached"
KINDS = ("boxes", "superpixels")
NOTE = """Targets: 1.8 for both stages; 15 s for the submitted run. Nodes of one CPU on one machine, each bound to a
core. A stage's seconds are those in its manifest, from its start to its commit; of several rounds the shortest.

"""
PIPELINE = """
store: {store}
tracking: null
stages:
  scenes: {{uses: ingest, source: {data}/scenes, layout: masks}}
  objects: {{uses: ingest, source: {data}/objects, layout: folder}}
  boxes: {{uses: selective_search, images: scenes, strategy: fast, size: 320}}
  superpixels: {{uses: superpixels, images: objects}}
"""


def tessera(arguments: list[str], environment: dict[str, str]) -> str:
    """What a command prints; raises when it fails."""
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def stage_seconds(config: Path, images: Path, cluster: Cluster, folder: Path, kinds: Sequence[str]) -> dict[str, float]:
    """Seconds of these stages on a cluster, in a new store that has the images already."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(images, folder)
    for kind in kinds:  # one after the other: each has all nodes to itself
        tessera(
            ["run", str(config), f"--store={folder}", f"--only={kind}", f"--address={cluster.address}"], cluster.tokens
        )
    return {artifact.kind: artifact.manifest.seconds for artifact in ArtifactStore(folder).artifacts()}


def cached_seconds(config: Path, store: Path, cluster: Cluster) -> float:
    """Seconds from the start of a submitted job to its end, when all is cached."""
    here = {**cluster.tokens, "RAY_API_SERVER_ADDRESS": cluster.jobs_address}
    job = tessera(["submit", str(config), f"--store={store}", "--driver-cpus=0", "--wait"], here).strip()
    (status,) = json.loads(tessera(["status", job, "--json"], here))
    return float(status["ended"] - status["started"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of the stages; without the job")
    parser.add_argument("--write", action="store_true", help="put the figures into RESULTS.md")
    options = parser.parse_args()
    best: dict[int, dict[str, float]] = {}
    jobs: list[float] = []
    with tempfile.TemporaryDirectory(prefix="nodes-") as name:
        folder = Path(name)
        config, images = folder / "nodes.yaml", folder / "images"
        config.write_text(PIPELINE.format(store=images, data=ROOT / "data"))
        tessera(["run", str(config), "--only=scenes,objects"], {})
        for _ in range(options.rounds):
            for count in (1, 2):
                cores = {number: str(number - 1) for number in range(1, count + 1)}
                caches = {number: {"TESSERA_CACHE": str(folder / f"cache-{number}")} for number in range(count + 1)}
                with started_cluster([0] + [1] * count, {"OMP_NUM_THREADS": "1"}, caches, cores) as cluster:
                    found = stage_seconds(config, images, cluster, folder / "store", options.kinds)
                    known = best.setdefault(count, found)
                    best[count] = {kind: min(known[kind], found[kind]) for kind in found}
                    if count == 2 and set(options.kinds) == set(KINDS):
                        jobs += [cached_seconds(config, folder / "store", cluster) for _ in range(2)]
    rows = [
        f"| {kind} | {best[1][kind]:.1f} | {best[2][kind]:.1f} | {best[1][kind] / best[2][kind]:.2f} |"
        for kind in options.kinds
    ]
    text = "\n".join(["| stage | one node, s | two nodes, s | times faster |", "| --- | --- | --- | --- |", *rows])
    text += "\n\n"
    if jobs:
        text += f"A submitted run that is all cached: {min(jobs):.1f} to {max(jobs):.1f} s from the job's start.\n"
    text += f"Load of the machine at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.\n"
    print(NOTE + text)
    if options.write:
        write_section(TITLE, "python -m tests.benchmarks.nodes", NOTE + text)


if __name__ == "__main__":
    main()
