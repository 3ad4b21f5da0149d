"""What stages ask for, held against what a machine or a cluster has, and against what it can grow to."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.config.load import Pipeline, load_pipeline
from pipeline.errors import ClusterError
from pipeline.run import capacity, cluster
from pipeline.run.capacity import Demand, Machine, Place, demand_of, lacking
from pipeline.run.cluster import Cluster
from tests.pipeline.workshop import Workshop


def asking(workshop: Workshop, resources: str) -> Pipeline:
    """A pipeline whose last stage has these resources, in line 4."""
    numbers, scaled = "n: {uses: fake_numbers, source: numbers.txt}", "s: {uses: fake_on_ray, numbers: n,"
    text = f"stages:\n  {numbers}\n  {scaled}\n    resources: {{{resources}}}}}\n"
    (workshop.folder / "p.yaml").write_text(text)
    return load_pipeline("p.yaml")


@pytest.mark.parametrize(
    ("resources", "machines", "place"),
    [
        ("", [], ""),
        ("concurrency: 9", [], ""),
        ("gpus: 0", [Machine(1, 0)], ""),
        ("gpus: 1", [Machine(2, 0), Machine(1, 1)], ""),
        ("gpus: 1", [Machine(2, 0)], "gpus: the stage asks for 1 CPU and 1 GPU, here has 2 CPUs and 0 GPUs"),
        ("gpus: 2", [Machine(2, 1), Machine(2, 1)], "gpus: the stage asks for 1 CPU and 2 GPUs, here has 4 CPUs"),
        ("cpus: 3", [Machine(2, 0), Machine(2, 0)], "cpus: the stage asks for 3 CPUs, here has 4 CPUs"),
        ("workers: 3", [Machine(2, 0), Machine(1, 0)], ""),
        ("workers: 3, cpus: 2", [Machine(3, 0), Machine(2, 0)], "workers: the stage asks for 3 workers with 2 CPUs"),
        ("workers: 3", [Machine(8, 2)], "workers: the stage asks for 3 workers with 1 CPU and 1 GPU each"),
        ("workers: 3, gpus: 0", [Machine(8, 2)], ""),
        ("workers: 4, gpus: 0.5", [Machine(8, 2)], ""),
        ("gpus: 1", [Machine(8, None)], ""),  # only Ray can tell
    ],
)
def test_demands_and_machines(workshop: Workshop, resources: str, machines: list[Machine], place: str) -> None:
    found = [str(problem) for problem in lacking(asking(workshop, resources), ["n", "s"], Place("here", machines))]
    assert bool(found) == bool(place), found
    if place:
        (problem,) = found
        assert problem.startswith(f"p.yaml:4: stages.s.resources.{place}")
        assert problem.endswith("with --address)")


def test_a_cluster_that_grows_is_not_refused_below_its_most(workshop: Workshop) -> None:
    small = [Machine(2, 0)]
    assert list(lacking(asking(workshop, "gpus: 1"), ["s"], Place("here", small, Machine(8, 4)))) == []
    (problem,) = lacking(asking(workshop, "gpus: 5"), ["s"], Place("here", small, Machine(8, 4)))
    assert "here has 2 CPUs and 0 GPUs, and its autoscaler has at most 8 CPUs and 4 GPUs" in problem.rule


@pytest.mark.parametrize(
    ("devices", "listed", "gpus"),
    [
        ([], None, 0),
        (["nvidia0", "nvidia1", "nvidiactl"], None, 2),
        (["nvidia0", "nvidia1"], "1", 1),
        (["nvidia0", "nvidia1"], "", 0),
        (["nvidia0", "nvidia1"], "0,-1,1", 1),
        (["kfd"], None, None),
    ],
)
def test_gpus_are_counted_without_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: list[str], listed: str | None, gpus: float | None
) -> None:
    for name in devices:
        (tmp_path / name).touch()
    monkeypatch.setattr(capacity, "DEVICES", tmp_path)
    monkeypatch.setattr(capacity, "NVIDIA", tmp_path / "none")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert capacity.visible_gpus() == gpus


class FakeRay(SimpleNamespace):
    """Ray whose placement group becomes ready, or never does."""

    def __init__(self, grows: bool) -> None:
        self.asked: list[object] = []
        self.removed: list[object] = []
        super().__init__(exceptions=SimpleNamespace(GetTimeoutError=TimeoutError), grows=grows)

    def get(self, ready: object, timeout: float) -> None:
        if not self.grows:
            raise TimeoutError

    def placement_group(self, bundles: object) -> SimpleNamespace:
        self.asked.append(bundles)
        return SimpleNamespace(ready=lambda: None)


@pytest.mark.parametrize("grows", [True, False])
def test_an_autoscaling_cluster_is_waited_for_and_said(grows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(grows)
    groups = SimpleNamespace(placement_group=ray.placement_group, remove_placement_group=ray.removed.append)
    for name, module in (("ray", ray), ("ray.util", SimpleNamespace()), ("ray.util.placement_group", groups)):
        monkeypatch.setitem(sys.modules, name, module)
    joined = Cluster("h:1", 2, 0, 1, None, (Machine(2, 0),), Machine(8, 4))
    said: list[str] = []
    joined.wait_for(Demand(2, 1, 0), said.append)
    assert not said
    monkeypatch.setattr(cluster, "GROWTH_SECONDS", 120.0)
    if grows:
        joined.wait_for(Demand(2, 1, 1), said.append)
    else:
        with pytest.raises(ClusterError, match=r"did not grow within 2 minutes .*resources\.gpus"):
            joined.wait_for(Demand(2, 1, 1), said.append)
    assert "asks for 2 workers with 1 CPU and 1 GPU each" in said[0]
    assert "waiting up to 2 minutes" in said[0]
    assert ray.asked == [[{"CPU": 1, "GPU": 1}] * 2]
    assert len(ray.removed) == 1


def test_nothing_is_asked_where_nothing_is_set(workshop: Workshop) -> None:
    assert demand_of(asking(workshop, ""), "s", 4) is None
