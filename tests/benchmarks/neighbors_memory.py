"""Peak memory of a task of `neighbors`, and its speed beside one FAISS search over all vectors at once.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.neighbors_memory [--vectors 100000 1000000] [--queries 4096]

Each search runs in a process of its own, which reports the largest memory it had. Vectors are random, 384 numbers each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data.tables import SCHEMAS
from stages.neighbors.blocks import Job, read_block
from stages.neighbors.search import Block, IndexSettings
from tests.benchmarks.results import write_section

TITLE = "Neighbours: memory of a task"
WIDTH, K, SHARD_ROWS = 384, 20, 1024
HEAD = [
    "| vectors | queries | in blocks, s | peak, MiB | FAISS over all at once, s | peak, MiB |",
    "| --- | --- | --- | --- | --- | --- |",
]
NOTE = "Target: the same peak for 100,000 and 1,000,000 vectors of 384. Exact, k = 20, one thread.\n\n"


def make(store: ArtifactStore, count: int) -> Artifact:
    """An embeddings artifact of random vectors."""
    writer, generator = store.begin("embeddings", f"e{count}"), np.random.default_rng(0)
    for shard, first in enumerate(range(0, count, SHARD_ROWS)):
        vectors = generator.normal(size=(min(SHARD_ROWS, count - first), WIDTH)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        offsets = pa.array(np.arange(len(vectors) + 1, dtype=np.int32) * WIDTH)
        columns = [pa.array(np.arange(first, first + len(vectors))), pa.ListArray.from_arrays(offsets, vectors.ravel())]
        writer.put_table(shard, pa.Table.from_arrays(columns, SCHEMAS["embeddings"].names))
    return writer.commit()


def search(address: str, count: int, queries: int, side: str) -> None:
    """Print seconds, peak memory and the sum of the ids found, as JSON."""
    import resource

    import faiss

    faiss.omp_set_num_threads(1)
    store = ArtifactStore(address)
    embeddings = Artifact.open(address, "embeddings", f"e{count}")
    shards = list(range(-(-queries // SHARD_ROWS)))
    start = time.perf_counter()
    block = read_block(embeddings, shards)
    asked = Block(block.ids[:queries], block.vectors[:queries])
    if side == "blocks":
        output = store.begin("neighbors", f"n{count}")
        ids, _ = Job(embeddings, output, IndexSettings(), K, None, gpu=False, threads=1).nearest(asked)
    else:
        everything = read_block(embeddings, range(len(list(embeddings.shards()))))
        found = faiss.knn(asked.vectors, everything.vectors, K + 1, metric=faiss.METRIC_INNER_PRODUCT)[1]
        ids = found[:, 1:]
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak": peak, "ids": int(ids.sum())}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--queries", type=int, default=4096)
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    parser.add_argument("--search", nargs=3, metavar=("STORE", "COUNT", "SIDE"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.search:
        address, count, side = asked.search
        search(address, int(count), asked.queries, side)
        return
    lines = list(HEAD)
    with tempfile.TemporaryDirectory() as folder:
        store = ArtifactStore(str(Path(folder) / "store"))
        for count in asked.vectors:
            make(store, count)
            found = {}
            for side in ("blocks", "at once"):
                command = [sys.executable, "-m", "tests.benchmarks.neighbors_memory", "--queries", str(asked.queries)]
                command += ["--search", store.address, str(count), side]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[side] = json.loads(done.stdout.splitlines()[-1])
            mine, other = found["blocks"], found["at once"]
            assert mine["ids"] == other["ids"], "both are exact"
            lines.append(
                f"| {count:,} | {asked.queries:,} | {mine['seconds']:.1f} | {mine['peak']:,.0f} "
                f"| {other['seconds']:.1f} | {other['peak']:,.0f} |"
            )
            print(lines[-1], flush=True)
    if asked.write:
        write_section(TITLE, "OMP_NUM_THREADS=1 python -m tests.benchmarks.neighbors_memory", NOTE + "\n".join(lines))


if __name__ == "__main__":
    main()
