"""What checkpoints cost at the default interval: their share of the training's time, in the driver and on Ray Train.

    python -m tests.benchmarks.checkpoints --write        # about 6 minutes on 2 idle cores

Each measurement is a fresh process that trains on the quickstart's photographs, with the settings' own defaults for
checkpoints. The figures are those of the artifact's manifest: seconds that rank 0 spent in saving, of all the seconds
of the training loop. The last checkpoint, which is made whatever the interval, is among them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

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
    backbone: {{name: {backbone}, img_size: 96}}
    method:
      name: dino_dense
      global_crops: {{size: 96, count: 2, scale: [0.25, 1.0]}}
      local_crops: {{size: 48, count: 4, scale: [0.05, 0.25]}}
    steps: {steps}
    batch_size: 16
    loader_workers: 1
    resources: {{workers: {workers}}}
"""


def measure(backbone: str, workers: int, steps: int) -> dict[str, Any]:
    """One run in a process of its own; 0 workers trains without Ray."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "train.yaml"
        config.write_text(
            PIPELINE.format(store=Path(folder) / "store", backbone=backbone, steps=steps, workers=workers)
        )
        command = [sys.executable, "-m", "pipeline.cli", "run", str(config), "--json"]
        environment = {**os.environ, "TESSERA_CACHE": str(Path(folder) / "cache")}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        artifact = Path(json.loads(done.stdout)["stages"][1]["artifact"])
        manifest = json.loads((artifact / "manifest.json").read_text())
    found: dict[str, Any] = manifest["notes"]["checkpoints"]
    return found


def main() -> None:
    """Measure and print, or write into RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write into RESULTS.md")
    parser.add_argument("--steps", type=int, default=80, help="of each run")
    options = parser.parse_args()
    rows = [
        "| backbone | runs in | checkpoints | seconds in them | of | share |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for backbone in ("vit_tiny_patch16_224", "vit_small_patch16_224"):
        for workers in (0, 1):
            found = measure(backbone, workers, options.steps)
            share = found["seconds"] / found["of_seconds"]
            place = "Ray Train" if workers else "the driver"
            rows.append(
                f"| {backbone} | {place} | {found['made']} | {found['seconds']:.2f} | {found['of_seconds']:.0f} s "
                f"| {share:.1%} |"
            )
            print(rows[-1])
    text = "\n".join(rows)
    if options.write:
        write_section("Checkpoints at the default interval", "python -m tests.benchmarks.checkpoints --write", text)
    else:
        print(text)


if __name__ == "__main__":
    main()
