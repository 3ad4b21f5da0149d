"""A node of the cluster loses its power in the middle of a stage: all of its processes at once."""

from __future__ import annotations

import pytest

from tests.faults.bench import Bench

pytestmark = pytest.mark.chaos


def test_a_node_that_computes_boxes_is_lost_for_good(bench: Bench) -> None:
    """The other node computes what it had."""
    bench.give("images")
    run = bench.start("--only", "boxes")
    bench.cluster.wait_for_worker("MapBatches", number=1)
    bench.cluster.kill_node(1)
    run.finish()
    bench.expect_undisturbed("images", "boxes")


def test_a_node_that_trains_is_lost_and_comes_back(bench: Bench) -> None:
    """Training waits for a second node, and goes on from its last checkpoint."""
    bench.give("images")
    run = bench.start("--only", "train")
    bench.cluster.wait_for_worker("TrainWorker", number=1)
    run.wait_for("of 60 steps")
    bench.cluster.kill_node(1)
    bench.cluster.restart_node(1)
    run.finish()
    bench.expect_undisturbed("images", "train")
