"""What a machine or cluster can give, beside what stages ask for in `resources:`. Imports neither Ray nor torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import Problem

if TYPE_CHECKING:
    from pipeline.config.load import Pipeline

DEVICES = Path("/dev")
NVIDIA = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True)
class Machine:
    """One node."""

    cpus: float
    gpus: float | None  # None: only Ray can tell

    def holds(self, demand: Demand) -> int:
        """How many workers of this size it can run at once."""
        pairs = [(self.cpus, demand.cpus), (demand.workers if self.gpus is None else self.gpus, demand.gpus)]
        return min((int(have / wanted + 1e-9) for have, wanted in pairs if wanted), default=demand.workers)


@dataclass(frozen=True)
class Demand:
    """What a stage needs at once: workers, or one task, each on one node."""

    workers: int
    cpus: float  # of each
    gpus: float

    def __str__(self) -> str:
        each = " and ".join(_count(amount, unit) for amount, unit in ((self.cpus, "CPU"), (self.gpus, "GPU")) if amount)
        return each if self.workers == 1 else f"{self.workers} workers with {each} each"

    def fits(self, machines: Iterable[Machine]) -> bool:
        """Whether these machines together can run it."""
        return sum(machine.holds(self) for machine in machines) >= self.workers


@dataclass(frozen=True)
class Place:
    """Where stages are to run."""

    name: str  # "this machine", "the Ray cluster at ..."
    machines: Sequence[Machine]
    most: Machine | None = None  # what an autoscaling cluster can have in all; None for one that does not grow

    def lacks(self, demand: Demand) -> str | None:
        """The demand and what there is, in words, where it can never be met here; None where it can."""
        if demand.fits(self.machines):
            return None
        total = demand.workers * demand.cpus, demand.workers * demand.gpus
        if self.most is not None and total[0] <= self.most.cpus and total[1] <= (self.most.gpus or 0):
            return None
        if self.most is None:
            return self.short_of(demand)
        most = f"{_count(self.most.cpus, 'CPU')} and {_count(self.most.gpus or 0, 'GPU')}"
        return f"{self.short_of(demand)}, and its autoscaler has at most {most}"

    def short_of(self, demand: Demand) -> str:
        """What a stage asks for, beside what there is."""
        cpus, gpus = sum(m.cpus for m in self.machines), sum(m.gpus or 0 for m in self.machines)
        return f"the stage asks for {demand}, {self.name} has {_count(cpus, 'CPU')} and {_count(gpus, 'GPU')}"


def demand_of(pipeline: Pipeline, name: str, gpus_there: float | None) -> Demand | None:
    """What a stage's `resources:` ask for; None where they ask for nothing.

    Args:
        pipeline: as loaded.
        name: of the stage.
        gpus_there: of the place where it is to run: workers take one each where there is one.
    """
    asked = pipeline.stages[name].stage.config.resources
    if asked.cpus is None and not asked.gpus and not asked.workers:
        return None
    workers = max(1, (asked.worker_counts or (1,))[0])  # the fewest: with them the stage can run
    gpus = asked.gpus if asked.gpus is not None else float(bool(asked.workers and gpus_there))
    return Demand(workers, asked.cpus or (1.0 if pipeline.stages[name].stage.uses_ray else 0.0), gpus)


def lacking(pipeline: Pipeline, names: Iterable[str], place: Place) -> Iterator[Problem]:
    """A problem for each of these stages that asks for more than the place can ever give."""
    gpus_there = sum(machine.gpus or 0 for machine in place.machines)
    for name in names:
        demand = demand_of(pipeline, name, gpus_there)
        if demand is None or (found := place.lacks(demand)) is None:
            continue
        key, remedy = "cpus", "lower resources.cpus or resources.workers, or join a larger cluster with --address"
        if demand.gpus and not Demand(demand.workers, 0, demand.gpus).fits(place.machines):
            key, remedy = "gpus", "set resources.gpus: 0 to use CPUs, or join a cluster that has them with --address"
        asked = pipeline.stages[name].stage.config.resources
        if getattr(asked, key) is None or (key == "cpus" and demand.workers > 1):
            key = "workers"
        yield pipeline.problem(f"stages.{name}.resources.{key}", found, remedy)


def this_machine() -> Machine:
    """What this process may use, as far as the system tells without a library of the GPU's maker."""
    return Machine(float(os.cpu_count() or 1), visible_gpus())


def visible_gpus() -> float | None:
    """NVIDIA's GPUs that CUDA_VISIBLE_DEVICES leaves; None where there is a device that may be another maker's."""
    found = len(list(NVIDIA.glob("*"))) or len(list(DEVICES.glob("nvidia[0-9]*")))
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if found and listed is not None:
        devices = [device.strip() for device in listed.split(",")]
        found = min(found, len(devices[: devices.index("-1")] if "-1" in devices else [d for d in devices if d]))
        return float(found)
    others = ("kfd", "dxg")  # AMD's, and NVIDIA's in WSL
    return float(found) if found or not any((DEVICES / name).exists() for name in others) else None


def _count(amount: float, unit: str) -> str:
    return f"{amount:g} {unit}" if amount == 1 else f"{amount:g} {unit}s"
