"""`kill -9` of the process that drives a run, alone or with the cluster's head: the same command again continues."""

from __future__ import annotations

import psutil
import pytest

from tests.faults.bench import Bench
from tests.faults.runs import Run

pytestmark = pytest.mark.chaos


def test_the_driver_while_boxes_are_computed(bench: Bench) -> None:
    run = bench.start("--only", "images,boxes")
    worker = bench.cluster.wait_for_worker("MapBatches")
    run.kill()
    psutil.wait_procs([worker], timeout=60)
    assert not worker.is_running()
    bench.start("--only", "images,boxes").finish()
    bench.expect_undisturbed("images", "boxes")


def test_the_driver_in_a_training_over_two_nodes(bench: Bench) -> None:
    bench.give("images")
    run = bench.start("--only", "train")
    run.wait_for("of 60 steps")
    workers = bench.cluster.workers("TrainWorker")
    assert len(workers) == 2
    run.kill()
    psutil.wait_procs(workers, timeout=60)
    assert not any(worker.is_running() for worker in workers)
    bench.start("--only", "train").finish()
    bench.expect_undisturbed("images", "train")


def test_the_head_with_a_submitted_run(bench: Bench) -> None:
    """The submitter waits until the head is back, and submits again: the new job continues."""
    bench.give("images")
    options = ["--address", bench.cluster.jobs_address, "--driver-cpus", "0", "--retries", "2"]
    submitter = Run(
        ["submit", str(bench.config), *options, "--only", "boxes"],
        bench.environment,
        bench.folder / "submit.log",
        "pipeline.cli",
    )
    submitter.wait_for("submitted.")
    bench.cluster.wait_for_worker("MapBatches")
    bench.cluster.kill_head()
    bench.cluster.restart_head()
    submitter.finish()
    assert "submitted again as" in submitter.text
    bench.expect_undisturbed("images", "boxes")


def test_the_head_under_a_driver_outside_of_it(bench: Bench) -> None:
    """Ray ends the driver, which it cannot go on with; on the new head, the same command continues."""
    bench.give("images")
    run = bench.start("--only", "boxes")
    bench.cluster.wait_for_worker("MapBatches")
    bench.cluster.kill_head()
    bench.cluster.restart_head()
    assert run.process.wait(180) != 0
    bench.start("--only", "boxes").finish()
    bench.expect_undisturbed("images", "boxes")
