"""What the tests of faults share: a cluster of two nodes, and the store of a run that nothing happened to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster, started_cluster
from tests.faults.bench import Bench


@pytest.fixture(scope="package")
def shared_cluster() -> Iterator[Cluster]:
    """Two nodes of one CPU each; the second node dies and comes back in some tests."""
    with started_cluster([1, 1], {"OMP_NUM_THREADS": "1"}) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Cluster:
    """The shared cluster, with both nodes up."""
    if not shared_cluster.nodes[0].running:
        shared_cluster.restart_head()
    if not shared_cluster.nodes[1].running:
        shared_cluster.restart_node(1)
    return shared_cluster


@pytest.fixture(scope="package")
def reference(shared_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a run on the same cluster that nothing happened to."""
    bench = Bench(tmp_path_factory.mktemp("undisturbed"), shared_cluster, None)
    bench.start().finish()
    return bench.store


@pytest.fixture
def bench(tmp_path: Path, cluster: Cluster, reference: Path) -> Bench:
    """An empty store and the pipeline."""
    return Bench(tmp_path, cluster, reference)
