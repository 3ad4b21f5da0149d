"""A whole pipeline whose Ray worker, driver and training worker are killed with -9 at random moments, and run again:
it completes, and its artifacts equal those of a run that nothing happened to. Part of `make test-slow`."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline.store.store import ArtifactStore

ROOT = Path(__file__).parents[1]
PIPELINE = """
store: {store}
tracking: null
stages:
  images: {{uses: ingest, source: configs/quickstart, layout: coco, limit: 12, shard_rows: 3}}
  boxes: {{uses: selective_search, images: images, strategy: fast, max_boxes: 20}}
  train:
    uses: pretrain
    images: images
    backbone:
      {{name: vit_tiny_patch16_224, img_size: 32, patch_size: 8, kwargs: {{depth: 2, embed_dim: 32, num_heads: 2}}}}
    method:
      name: dino
      global_crops: {{size: 32, count: 2, scale: [0.4, 1.0]}}
      local_crops: {{size: 16, count: 2, scale: [0.05, 0.4]}}
      head: {{prototypes: 32, hidden: 32, bottleneck: 16}}
    steps: 60
    batch_size: 4
    log_every: 1
    checkpoint_every: 5
    loader_workers: 0
    resources: {{workers: 1, cpus: 1}}
"""


def start(config: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipeline.cli", "run", str(config), "--json"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def worker_of(driver: subprocess.Popen[str], name: str) -> psutil.Process:
    """The first process below the driver that Ray named after `name`; waits for it, fails when the run ends first."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        if driver.poll() is not None:
            pytest.fail(f"the run ended before a {name} was seen: {driver.communicate()[1][-2000:]}")
        for child in children(driver.pid):
            try:
                if child.cmdline() and name in child.cmdline()[0]:
                    return child
            except psutil.Error:
                continue
        time.sleep(0.05)
    pytest.fail(f"no {name} within 180 s")


def children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def finished(driver: subprocess.Popen[str]) -> dict[str, dict[str, str]]:
    out, err = driver.communicate(timeout=300)
    assert driver.returncode == 0, err[-3000:]
    return {stage["name"]: stage for stage in json.loads(out)["stages"]}


def terms(stage: dict[str, str]) -> list[list[float]]:
    kind, fingerprint = stage["artifact"].split("/")[-2:]
    artifact = ArtifactStore(stage["artifact"].rsplit("/", 2)[0]).find(kind, fingerprint)
    assert artifact is not None
    return [[row[k] for k in ("step", "align_image", "grad_norm")] for row in json.loads(artifact.read("curves.json"))]


@pytest.mark.slow
def test_killed_at_random_moments_and_run_again(tmp_path: Path, pause: Callable[[float, float], None]) -> None:
    whole, cut = tmp_path / "whole.yaml", tmp_path / "cut.yaml"
    whole.write_text(PIPELINE.format(store=tmp_path / "whole"))
    cut.write_text(PIPELINE.format(store=tmp_path / "cut"))
    expected = finished(start(whole))

    first = start(cut)
    victim = worker_of(first, "ray::MapBatches")
    pause(0, 1)
    victim.kill()  # a Ray worker: the run goes on
    worker_of(first, "TrainWorker")
    pause(0, 8)
    worker = worker_of(first, "TrainWorker")
    os.kill(first.pid, signal.SIGKILL)  # the driver: its training worker goes with it
    first.communicate()
    psutil.wait_procs([worker], timeout=60)
    assert not worker.is_running()

    second = start(cut)
    victim = worker_of(second, "TrainWorker")
    pause(0, 8)
    if victim.is_running():
        victim.kill()  # a training worker: it is started again from the last checkpoint
    found = finished(second)

    assert found["images"]["state"] == found["boxes"]["state"] == "cached"
    assert terms(found["train"]) == terms(expected["train"])
    stores = [ArtifactStore(str(tmp_path / name)) for name in ("whole", "cut")]
    fingerprint = expected["boxes"]["fingerprint"]
    files = [[entry.sha256 for entry in s.find("boxes", fingerprint).shards()] for s in stores]  # type: ignore[union-attr]
    assert files[0] == files[1]


@pytest.fixture
def pause(record_property: Callable[[str, object], None]) -> Callable[[float, float], None]:
    """Waits for a random time, which the test's report keeps."""

    def wait(least: float, most: float) -> None:
        seconds = random.uniform(least, most)
        record_property("pause", seconds)
        print(f"paused {seconds:.2f} s")
        time.sleep(seconds)

    return wait
