"""How many trials run at once, and what each may use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.config.load import with_overrides
from pipeline.errors import ConfigError, Problem
from pipeline.run import capacity
from pipeline.run.capacity import Demand, Machine

if TYPE_CHECKING:
    from pipeline.config.load import Pipeline


@dataclass(frozen=True)
class Slots:
    """Places for trials. With `cpus` and `gpus` 0, the stages of a trial take what they need by themselves."""

    count: int
    cpus: float  # of each
    gpus: float

    def __str__(self) -> str:
        at_once = "one trial at a time" if self.count == 1 else f"{self.count} trials at once"
        if not self.cpus:
            return at_once
        each = f"{self.cpus:g} CPU{'' if self.cpus == 1 else 's'}" + (f" and {self.gpus:g} GPU" if self.gpus else "")
        return f"{at_once}, with {each}{' each' if self.count > 1 else ''}"


def make_slots(
    pipeline: Pipeline, stages: Iterable[str], machines: Sequence[Machine], trials: int, wanted: int | None
) -> Slots:
    """Divide a cluster among trials.

    Args:
        pipeline: of a trial.
        stages: those that trials compute.
        machines: of the cluster.
        trials: that are left.
        wanted: trials at once, as the user has it; None: as many as there is room for.

    Raises:
        ConfigError: the cluster has no room for one trial, or cannot tell whether there is for as many as wanted.
    """
    pipeline = as_trial(pipeline, pipeline.name)
    asked = {name: pipeline.stages[name].stage.config.resources for name in stages}
    gpus_there = sum(machine.gpus or 0 for machine in machines)
    most = wanted or trials
    outside = [name for name in asked if pipeline.stages[name].stage.uses_ray]
    problems = list(capacity.lacking(pipeline, asked, capacity.Place("the cluster", machines)))
    if problems:
        raise ConfigError(problems)
    if outside:  # Ray Train or Ray Data has workers of its own, which a trial's process must leave room for
        unsized = [name for name in outside if not (asked[name].workers and asked[name].cpus)]
        if unsized and (wanted or 1) > 1:
            raise ConfigError([_unsized(pipeline, name) for name in unsized])
        demands = [capacity.demand_of(pipeline, name, gpus_there) for name in outside if name not in unsized]
        rooms = [_room(demand, machines) for demand in demands if demand is not None]
        return Slots(1 if unsized else max(1, min(most, *rooms)), 0, 0)
    gpus = max((r.gpus if r.gpus is not None else float(gpus_there > 0) for r in asked.values()), default=0.0)
    cpus = max((r.cpus or 0.0 for r in asked.values()), default=0.0)
    room = sum(machine.holds(Demand(most, cpus or 1.0, gpus)) for machine in machines)
    count = max(1, min(most, room))
    if not cpus:  # as much as leaves room for that many
        sizes = range(int(max(machine.cpus for machine in machines)), 0, -1)
        fitting = (size for size in sizes if sum(m.holds(Demand(count, size, gpus)) for m in machines) >= count)
        cpus = float(next(fitting, 1))
    return Slots(count, cpus, gpus)


def _room(demand: Demand, machines: Sequence[Machine]) -> int:
    """How often a demand fits."""
    return sum(machine.holds(Demand(1 << 20, demand.cpus, demand.gpus)) for machine in machines) // demand.workers


def _unsized(pipeline: Pipeline, stage: str) -> Problem:
    return pipeline.problem(
        f"stages.{stage}.resources",
        "trials at once need to know what each takes, and this stage sizes itself by the whole cluster",
        "set workers: 0, or workers and cpus; or leave `concurrent` out of the space",
    )


def as_trial(pipeline: Pipeline, name: str) -> Pipeline:
    """The pipeline for a trial's process: not tracked there, and trained there where workers are not asked for.

    Only the driver talks to MLflow. `resources` are no part of a fingerprint, so the artifacts are the same.
    """
    for stage, entry in pipeline.stages.items():
        if entry.stage.uses_ray and entry.stage.config.resources.workers is None:
            here = with_overrides(pipeline, [f"stages.{stage}.resources.workers=0"])
            if not here.stages[stage].stage.uses_ray:
                pipeline = replace(here, stages={known: here.stages[known] for known in pipeline.stages})
    return replace(pipeline, name=name, tracking=None, tracking_required=False, mirrors={})
