"""`kill -9` of a worker in every stage: the run goes on by itself, and its artifacts equal an undisturbed run's."""

from __future__ import annotations

import pytest

from tests.faults.bench import Bench

pytestmark = pytest.mark.chaos

UPSTREAM = {
    "images": (),
    "boxes": ("images",),
    "superpixels": ("images",),
    "train": ("images",),
    "embeddings": ("images", "train"),
    "neighbors": ("images", "train", "embeddings"),
}
# What Ray calls the process that computes: a function, or the class of an actor.
WORKERS = {
    "images": "_check_remote",
    "boxes": "MapBatches",
    "superpixels": "MapBatches",
    "train": "TrainWorker",
    "embeddings": "MapWorker",
    "neighbors": "MapBatches",
}


@pytest.mark.parametrize("stage", ["images", "boxes", "superpixels", "embeddings", "neighbors"])
def test_a_worker_of_ray_data_or_of_a_task(bench: Bench, stage: str) -> None:
    bench.give(*UPSTREAM[stage])
    run = bench.start("--only", stage)
    bench.cluster.wait_for_worker(WORKERS[stage]).kill()
    run.finish()
    bench.expect_undisturbed(*UPSTREAM[stage], stage)


def test_a_training_worker_on_another_node(bench: Bench) -> None:
    bench.give("images")
    run = bench.start("--only", "train")
    worker = bench.cluster.wait_for_worker(WORKERS["train"], number=1)
    run.wait_for("of 60 steps")
    assert worker.is_running()
    worker.kill()
    run.finish()
    bench.expect_undisturbed("images", "train")
