"""Where the time of a sweep goes, and what it costs beside as many separate runs.

    python -m tests.benchmarks.sweep --write                # 8 trials, 8 separate runs
    python -m tests.benchmarks.sweep --separate 2 --write   # 2 separate runs stand for all 8

The sweep is what a user types, in a process of its own, with an empty store: 8 trials over the loss weights of a small
training on data/objects, whose upstream is about half of a run. Torch has one thread in both, so that stage seconds
mean the same: a trial of a sweep on two cores has one of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from tests.benchmarks.results import write_section

ROOT = Path(__file__).parents[2]
TRIALS = 8
BUSY, COST = 0.85, 0.60  # the targets: least share of the wall time, most of the separate runs' stage seconds


def pipeline(store: Path, steps: int) -> dict[str, Any]:
    """Ingest and a first training, then what the trials change: a second training and its evaluation."""
    train = {
        "uses": "pretrain",
        "images": "objects",
        "method": {
            "name": "dino_dense",
            "global_crops": {"size": 96, "count": 2, "scale": [0.25, 1.0]},
            "local_crops": {"size": 48, "count": 2, "scale": [0.05, 0.25]},
            "head": {"prototypes": 256, "hidden": 512, "bottleneck": 128},
            "dense_head": {"prototypes": 64, "hidden": 256, "bottleneck": 64},
        },
        "batch_size": 32,
        "resources": {"workers": 0},
    }
    backbone = {"name": "resnet18", "img_size": 96, "out_stage": "c4"}
    stages = {
        "objects": {"uses": "ingest", "source": str(ROOT / "data/objects"), "layout": "folder", "limit": 800},
        "warmup": {**train, "backbone": backbone, "steps": steps + steps // 5},  # as long as training and evaluation
        "train": {**train, "init": "warmup", "steps": steps},
        "knn": {
            "uses": "classify_knn",
            "images": "objects",
            "encoder": "train",
            "resize": 128,
            "crop": 112,
            "random_baseline": False,
        },
    }
    return {"name": "bench", "store": str(store), "tracking": None, "stages": stages}


def space() -> dict[str, Any]:
    """Eight settings of two weights."""
    weights = {
        "stages.train.method.weights.align_patch": {"loguniform": [0.1, 10]},
        "stages.train.method.weights.align_image": {"loguniform": [0.1, 10]},
    }
    return {"objective": "knn.top1", "space": weights, "trials": TRIALS}


def tessera(*arguments: str) -> tuple[dict[str, Any], float]:
    """What a command prints as JSON, and its wall time in seconds."""
    began = time.monotonic()
    command = [sys.executable, "-m", "pipeline.cli", *arguments, "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout), time.monotonic() - began


def main() -> None:
    """Measure and print; write into RESULTS.md where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of a trial's training")
    parser.add_argument("--separate", type=int, default=TRIALS, help="separate runs to measure")
    parser.add_argument("--write", action="store_true", help="put the figures into RESULTS.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config, ranges = folder / "p.yaml", folder / "s.yaml"
        ranges.write_text(yaml.safe_dump(space()))
        config.write_text(yaml.safe_dump(pipeline(folder / "together", options.steps)))
        swept, wall = tessera("sweep", str(config), "--space", str(ranges), "--to", str(folder / "out"))
        shared = sum(seconds_of(folder / "together", swept["shared"]))
        own = [sum(rung_seconds) for rung_seconds in stage_seconds(folder / "together", swept["shared"])]
        separate = []
        for number, trial in enumerate(swept["trials"][: options.separate]):
            config.write_text(yaml.safe_dump(pipeline(folder / f"alone-{number}", options.steps)))
            sets = [f"--set={path}={value}" for path, value in trial["values"].items()]
            run, _ = tessera("run", str(config), *sets)
            separate.append([stage["seconds"] for stage in run["stages"]])
    alone = sum(map(sum, separate)) / len(separate)
    upstream = sum(sum(stages[:2]) for stages in separate) / sum(map(sum, separate))
    busy = (shared + sum(own) / swept["slots"]) / wall
    cost = (shared + sum(own)) / (TRIALS * alone)
    phases = {**swept["seconds"], "imports and plan": wall - sum(swept["seconds"].values())}
    rows = [
        ("wall time", f"{wall:.0f} s, {swept['slots']} trials at once"),
        *((f"- {phase}", f"{seconds:.1f} s") for phase, seconds in phases.items()),
        ("stage seconds: shared", f"{shared:.0f}"),
        ("stage seconds: trials", f"{sum(own):.0f}"),
        ("in training and evaluation", f"{busy:.0%} of the wall time (target: at least {BUSY:.0%})"),
        ("a separate run", f"{alone:.0f} stage seconds, {upstream:.0%} of them upstream (of {len(separate)} runs)"),
        ("cost", f"{cost:.0%} of {TRIALS} separate runs' stage seconds (target: at most {COST:.0%})"),
    ]
    body = "| | |\n| --- | --- |\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)
    print(body)
    if options.write:
        write_section(f"A sweep of {TRIALS} trials", f"python -m tests.benchmarks.sweep --steps {options.steps}", body)


def seconds_of(store: Path, stages: list[str]) -> list[float]:
    """Of the artifacts that these stages made."""
    manifests = [json.loads(path.read_text()) for path in store.glob("*/*/manifest.json")]
    return [manifest["seconds"] for manifest in manifests if manifest["stage"] in stages]


def stage_seconds(store: Path, shared: list[str]) -> list[list[float]]:
    """Of the artifacts that the trials made, a list a stage."""
    manifests = [json.loads(path.read_text()) for path in store.glob("*/*/manifest.json")]
    names = sorted({manifest["stage"] for manifest in manifests} - set(shared))
    return [[m["seconds"] for m in manifests if m["stage"] == name] for name in names]


if __name__ == "__main__":
    main()
