"""Training over two nodes, and what happens to it there: a rank killed, stopped or told to end, a node lost or drained.

Each test starts a cluster of two nodes on loopback addresses and runs `tessera run --address` on it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from tests.cluster import Cluster

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

ROOT = Path(__file__).parents[4]
PIPELINE = """
store: {store}
tracking: null
stages:
  images: {{uses: ingest, source: configs/quickstart, layout: coco, limit: 12, shard_rows: 3}}
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
    steps: {steps}
    batch_size: 4
    log_every: 3
    checkpoint_every: {every}
    loader_workers: 0
{more}
    resources: {resources}
"""
BOTH = "{workers: 2, cpus: 1}"
ELASTIC = "{workers: {min: 1, max: 2}, cpus: 1}"
COUNTED_S = 25.0  # Ray's coordinator, which an elastic training asks for room, looks at the cluster every 20 s
TERMS = ("step", "align_image", "total", "grad_norm")


class Run:
    """One `tessera run` in a process of its own."""

    def __init__(
        self, folder: Path, cluster: Cluster | None, *, resources: str = BOTH, more: str = "", **numbers: int
    ) -> None:
        self.store = folder / "store"
        config = folder / "run.yaml"
        settings = {"resources": resources, "more": more, "steps": 200, "every": 5, **numbers}
        config.write_text(PIPELINE.format(store=self.store, **settings))
        command = [sys.executable, "-m", "pipeline.cli", "run", str(config), "--json"]
        command += ["--address", cluster.address] if cluster else []
        environment = {**os.environ, "TESSERA_CACHE": str(folder / "cache"), **(cluster.tokens if cluster else {})}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.told = ""

    def wait_for_checkpoint(self, at_least: int = 10, seconds: float = 240) -> int:
        """The step of a whole checkpoint, as soon as one has made so many."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                pytest.fail(f"the run ended before step {at_least}: {self.process.communicate()[1][-3000:]}")
            if (step := self.saved()) >= at_least:
                return step
            time.sleep(0.05)
        pytest.fail(f"no checkpoint of step {at_least} within {seconds:g} s")

    def saved(self) -> int:
        """The step of the newest checkpoint that lies in the store."""
        steps = [0]
        for file in self.store.rglob("progress.json"):
            try:
                steps.append(json.loads(file.read_text())["step"])
            except (OSError, ValueError):
                continue  # it is being written, or removed
        return max(steps)

    def artifact(self) -> Artifact:
        """The finished encoder."""
        out, self.told = self.process.communicate(timeout=400)
        assert self.process.returncode == 0, self.told[-4000:]
        train = json.loads(out)["stages"][1]
        kind, fingerprint = train["artifact"].split("/")[-2:]
        found = ArtifactStore(str(self.store)).find(kind, fingerprint)
        assert found is not None
        return found

    def end(self) -> None:
        """Whatever happened to the test, nothing is left running."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


def curve(artifact: Artifact) -> torch.Tensor:
    return torch.tensor([[row[name] for name in TERMS] for row in json.loads(artifact.read("curves.json"))])


def ranks(artifact: Artifact) -> dict[int, int]:
    """From which step on how many ranks trained."""
    return {int(step): count for step, count in artifact.manifest.notes["ranks"].items()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """What two ranks on one node make when nothing happens."""
    run = Run(tmp_path_factory.mktemp("whole"), None, resources="{workers: 2, cpus: 0.5}")
    try:
        return run.artifact()
    finally:
        run.end()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A head and another node with one CPU each; tests leave both running."""
    cluster = Cluster([1, 1], dashboard=False, environment={"RAY_health_check_period_ms": "1000"})
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def start(tmp_path: Path, nodes: Cluster) -> Iterator[Callable[..., Run]]:
    """`start(resources=..., more=...)` starts a run on the cluster."""
    runs: list[Run] = []

    def one(**given: Any) -> Run:
        runs.append(Run(tmp_path, nodes, **given))
        return runs[-1]

    yield one
    for run in runs:
        run.end()


def rank_on(nodes: Cluster, number: int) -> psutil.Process:
    return nodes.wait_for_worker("TrainWorker", number, seconds=120)


def assert_alike(found: Artifact, expected: Artifact) -> None:
    torch.testing.assert_close(curve(found), curve(expected), rtol=1e-4, atol=1e-6)


def test_a_rank_killed_on_another_node_changes_nothing(
    start: Callable[..., Run], nodes: Cluster, expected: Artifact
) -> None:
    run = start()
    run.wait_for_checkpoint()
    rank_on(nodes, 1).kill()
    found = run.artifact()
    assert_alike(found, expected)
    assert ranks(found) == ranks(expected) == {0: 2}
    assert re.search(r"train: rank \d.*training starts again from its last checkpoint \(restart 1 of 3\)", run.told)
    assert re.search(r"train: training goes on from step \d+ of 200 on 2 ranks", run.told)


def test_a_rank_that_answers_no_more_is_given_up(start: Callable[..., Run], nodes: Cluster, expected: Artifact) -> None:
    run = start(more="    lost_rank_minutes: 0.5")
    run.wait_for_checkpoint()
    rank_on(nodes, 1).send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    found = run.artifact()
    assert time.monotonic() - stopped < 240
    assert_alike(found, expected)
    assert "restart 1 of 3" in run.told


def test_a_rank_told_to_end_saves_first(start: Callable[..., Run], nodes: Cluster, expected: Artifact) -> None:
    run = start()
    run.wait_for_checkpoint()
    rank_on(nodes, 1).send_signal(signal.SIGTERM)
    found = run.artifact()
    assert_alike(found, expected)
    assert "a rank was told to end, and training has saved: training starts again" in run.told


def test_an_elastic_training_goes_on_with_the_node_that_is_left(
    start: Callable[..., Run], nodes: Cluster, expected: Artifact
) -> None:
    run = start(resources=ELASTIC)
    run.wait_for_checkpoint()
    nodes.kill_node(1)
    try:
        found = run.artifact()
    finally:
        nodes.restart_node(1)
        time.sleep(COUNTED_S)
    torch.testing.assert_close(curve(found), curve(expected), rtol=2e-2, atol=1e-3)
    (first, two), (later, one) = ranks(found).items()
    assert (first, two, one) == (0, 2, 1)
    assert 0 < later < 200
    assert f"training goes on from step {later} of 200 on 1 rank\n" in run.told


def test_a_drained_node_is_left_with_a_checkpoint(start: Callable[..., Run], nodes: Cluster) -> None:
    run = start(resources=ELASTIC, more="    max_failures: 0", steps=5000, every=1000)
    run.wait_for_checkpoint(1000)
    drain(nodes, 1, seconds=10)
    try:
        found = run.artifact()
    finally:
        nodes.restart_node(1)
        time.sleep(COUNTED_S)
    assert "1 node of the training will be taken away: it saves now" in run.told
    (_, two), (later, one) = ranks(found).items()
    assert (two, one) == (2, 1)
    assert later % 1000, "it went on from the checkpoint of the warning, not from a regular one"


def test_an_interrupted_run_saves_first(start: Callable[..., Run]) -> None:
    run = start(steps=5000, every=1000)
    run.wait_for_checkpoint(1000)
    time.sleep(3)  # the end of that checkpoint would do for the one that an interrupt at once asks for
    run.process.send_signal(signal.SIGINT)
    run.process.communicate(timeout=60)
    assert run.process.returncode == 130
    assert run.saved() % 1000, "the newest checkpoint is that of the interrupt"


def drain(nodes: Cluster, number: int, seconds: int) -> None:
    """`ray drain-node` of one node, as a cloud's warning makes it."""
    host = nodes.nodes[number].host
    code = (
        f"import ray; ray.init(address='{nodes.address}', log_to_driver=False, logging_level='ERROR'); "
        f"print([n['NodeID'] for n in ray.nodes() if n['Alive'] and n['NodeManagerAddress'] == '{host}'][0])"
    )
    environment = {**os.environ, **nodes.tokens}
    node_id = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()[-1]
    command = [str(Path(sys.executable).parent / "ray"), "drain-node", f"--address={nodes.address}"]
    command += [f"--node-id={node_id}", "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot"]
    command += [f"--deadline-remaining-seconds={seconds}"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
