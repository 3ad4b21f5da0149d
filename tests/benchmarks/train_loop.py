"""Steps a second of the training loop: inside Ray Train against the same loop in a plain process.

    python -m tests.benchmarks.train_loop --write        # about 4 minutes on 2 idle cores

Each measurement is a fresh process that trains `dino_dense` on the quickstart's photographs; the two kinds take turns.
A figure is the median over the logged windows of a run, the first (warming up) left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.results import write_section

ROOT = Path(__file__).parents[2]
PIPELINE = """
store: {store}
tracking: null
stages:
  images: {{uses: ingest, source: configs/quickstart, layout: coco, shard_rows: 13}}
  train:
    uses: pretrain
    images: images
    backbone: {{name: vit_tiny_patch16_224, img_size: 96}}
    method:
      name: dino_dense
      global_crops: {{size: 96, count: 2, scale: [0.25, 1.0]}}
      local_crops: {{size: 48, count: 4, scale: [0.05, 0.25]}}
      head: {{prototypes: 512, hidden: 512, bottleneck: 128}}
      dense_head: {{prototypes: 128, hidden: 512, bottleneck: 128}}
    steps: {steps}
    batch_size: 16
    log_every: 10
    checkpoint_every: {steps}
    loader_workers: 1
    resources: {{workers: {workers}}}
"""


def steps_per_second(workers: int, steps: int) -> float:
    """One run in a process of its own; 0 workers trains without Ray."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "train.yaml"
        config.write_text(PIPELINE.format(store=Path(folder) / "store", steps=steps, workers=workers))
        command = [sys.executable, "-m", "pipeline.cli", "run", str(config), "--json"]
        environment = {**os.environ, "TESSERA_CACHE": str(Path(folder) / "cache")}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        artifact = Path(json.loads(done.stdout)["stages"][1]["artifact"])
        curves = json.loads(next(artifact.glob("curves.*json")).read_text())
    return statistics.median(row["images_per_s"] for row in curves[1:]) / 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="put the figures into RESULTS.md")
    options = parser.parse_args()

    pairs = []
    for number in range(options.rounds):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        speed = {workers: steps_per_second(workers, options.steps) for workers in order}
        pairs.append((speed[1], speed[0]))
        print(f"round {number + 1}: Ray Train {speed[1]:.2f} steps/s, plain {speed[0]:.2f} steps/s", flush=True)
    ratio = statistics.median(ray / plain for ray, plain in pairs)
    ray, plain = (statistics.median(side) for side in zip(*pairs, strict=True))
    body = (
        f"ViT-Ti/16 at 96 px, 2x96 + 4x48, batch 16, one worker with both cores; median of {options.rounds} rounds; "
        f"target: at least 0.95.\n\n- Ray Train: {ray:.2f} steps/s\n- plain process: {plain:.2f} steps/s\n"
        f"- ratio (median of the rounds' ratios): {ratio:.2f}"
    )
    print(body)
    if options.write:
        write_section(
            "Training loop: Ray Train against a plain process", "python -m tests.benchmarks.train_loop --write", body
        )


if __name__ == "__main__":
    main()
