"""What a stage may use of a cluster: its nodes, less the CPUs that the run's own driver holds."""

from __future__ import annotations

import pytest

from pipeline.errors import ClusterError
from pipeline.stage import DRIVER_CPUS, nodes
from stages.map_images.execution import count_workers


def test_the_cpus_of_a_submitted_driver_are_taken_off(ray_local: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DRIVER_CPUS, raising=False)
    assert [node["CPU"] for node in nodes()] == [2.0]
    assert count_workers(1.0, 0.0, None) == 2
    monkeypatch.setenv(DRIVER_CPUS, "1.5")
    assert [node["CPU"] for node in nodes()] == [0.5]
    assert count_workers(0.5, 0.0, None) == 1
    with pytest.raises(ClusterError, match=r"1 nodes has 0\.5 and 0"):
        count_workers(1.0, 0.0, None)


def test_no_more_workers_than_asked_for(ray_local: None) -> None:
    assert count_workers(0.25, 0.0, 3) == 3
