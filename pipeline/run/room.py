"""Which stages fit on a cluster at the same time, and what each may use of it. Imports neither Ray nor torch.

Stages are served in the order in which they come: one that does not fit keeps those behind it waiting, so that none
waits for ever. The shares are sizes: on which node a worker runs is Ray's choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pipeline.share import Share

if TYPE_CHECKING:
    from pipeline.stage import Stage

SLACK = 1e-9  # sums of fractions of a CPU
Takes = Literal["all", "asked", "free"]


@dataclass(frozen=True)
class Need:
    """What a stage takes: the whole cluster, just what it asks for, or of what is free a worker at least."""

    takes: Takes
    workers: int = 1  # at least
    cpus: float = 1.0  # of each worker
    gpus: float = 0.0
    most: int | None = None  # workers
    node: str | None = None  # the only node that counts, all of it
    in_driver: bool = False  # it runs in the driver's process, where stages run one after the other


def need_of(stage: Stage[Any], there: Share, own: str | None, driver_cpus: float) -> Need:
    """What a stage needs of a cluster.

    A stage in the driver's process computes with as many threads as its machine has CPUs, so that it takes the node it
    is on, unless `resources:` say what it takes, or the driver of a submitted run holds CPUs of its own.

    Args:
        stage: with its settings.
        there: all nodes.
        own: the node that this process runs on; None where it is none of them.
        driver_cpus: CPUs that the driver holds beside the cluster's.
    """
    asked, gpus_there = stage.config.resources, _total(there, "GPU")
    if not stage.uses_ray:
        if driver_cpus >= 1 or own is None or own not in there:
            return Need("asked", 0, in_driver=True)
        if asked.cpus is None:
            return Need("asked", 1, node=own, in_driver=True)
        return Need("asked", 1, asked.cpus, asked.gpus or 0.0, in_driver=True)
    if not stage.whole_cluster:
        gpus = asked.gpus if asked.gpus is not None else min(stage.worker_gpus, gpus_there)
        return Need("free", 1, asked.cpus or 1.0, gpus, asked.concurrency)
    # A training's share must not depend on what else runs: on a CPU its results depend on the number of threads.
    gpus = asked.gpus if asked.gpus is not None else float(gpus_there > 0)
    fewest, most = asked.worker_counts or (0, 0)
    if fewest != most:
        return Need("all")  # it grows with the cluster
    if gpus and most:
        return Need("asked", most, asked.cpus or _cpus_beside(gpus, there), gpus)
    if not gpus and asked.cpus:
        return Need("asked", most or 1, asked.cpus)
    return Need("all")


@dataclass
class Room:
    """What running stages have of a cluster. At most `parallel` of them run at the same time."""

    parallel: int | None = None
    taken: dict[str, Share] = field(default_factory=dict)  # by stage
    in_driver: set[str] = field(default_factory=set)  # stages

    def offer(self, there: Share) -> Offer:
        """What is free of a cluster's nodes now."""
        return Offer(self, there)

    def leave(self, stage: str) -> None:
        """The stage has ended."""
        self.taken.pop(stage, None)
        self.in_driver.discard(stage)


class Offer:
    """One look at what is free: stages are added while they fit, then the rest is dealt out among them."""

    def __init__(self, room: Room, there: Share) -> None:
        self._room, self._there = room, there
        self._free = {node: {name: has.get(name, 0.0) for name in ("CPU", "GPU")} for node, has in there.items()}
        for share in room.taken.values():
            for node, used in share.items():
                if node in self._free:
                    _take(self._free[node], used)
        self._added: dict[str, tuple[Need, dict[str, dict[str, float]]]] = {}
        self._whole: str | None = None  # the stage that has the whole cluster

    def lane_is_busy(self, need: Need) -> bool:
        """Whether the stage would have to wait for another one in the driver's process."""
        return need.in_driver and bool(self._room.in_driver | {s for s, (n, _) in self._added.items() if n.in_driver})

    def fits(self, need: Need) -> bool:
        """Whether a stage could start now.

        What fits nowhere even when nothing else runs may start alone: a cluster may grow, and a stage says best what
        it lacks.
        """
        running = len(self._room.taken) + len(self._added)
        if running and running >= (self._room.parallel or math.inf):
            return False
        if not self._users():
            return True
        return need.takes != "all" and self._place(need, {n: dict(has) for n, has in self._free.items()}) is not None

    def add(self, stage: str, need: Need) -> None:
        """Start this stage, for which `fits` was true."""
        placed = None if need.takes == "all" else self._place(need, self._free)
        if placed is None:
            self._whole = stage
            self._free = {node: {"CPU": 0.0, "GPU": 0.0} for node in self._free}
        self._added[stage] = (need, placed or {})

    def deal(self) -> dict[str, Share | None]:
        """Deal out what is left, and note what every added stage has; None is the whole cluster, whatever it grows to.

        What is left goes to the stages that take what is free, worker by worker in turn; all of it where there is only
        one such stage.
        """
        takers = [stage for stage, (need, _) in self._added.items() if need.takes == "free" and stage != self._whole]
        if len(takers) == 1 and self._added[takers[0]][0].most is None:
            (stage,) = takers
            if self._users() == {stage}:
                self._whole = stage
            for node, has in self._free.items():
                if any(has.values()):
                    _take(has, _put(self._added[stage][1], node, dict(has)))
        for node in self._free:
            self._deal_out(node, takers)
        shares: dict[str, Share | None] = {}
        for stage, (need, placed) in self._added.items():
            self._room.taken[stage] = self._there if stage == self._whole else placed
            if need.in_driver:
                self._room.in_driver.add(stage)
            shares[stage] = None if stage == self._whole or need.in_driver else self._with_the_rest(placed)
        return shares

    def _users(self) -> set[str]:
        """The stages that hold something of the cluster; one in a driver with CPUs of its own does not."""
        added = {stage for stage, (_, placed) in self._added.items() if placed or stage == self._whole}
        return added | {stage for stage, share in self._room.taken.items() if share}

    def _deal_out(self, node: str, takers: list[str]) -> None:
        """Worker by worker, to the stage that has fewest, until none fits on this node."""
        workers = {stage: self._workers(stage) for stage in takers}
        has = self._free[node]
        while workers:
            stage = min(workers, key=workers.__getitem__)
            need, placed = self._added[stage]
            if workers[stage] >= (need.most or math.inf) or _holds(has, need) < 1:
                del workers[stage]
                continue
            _take(has, _put(placed, node, {"CPU": need.cpus, "GPU": need.gpus}))
            workers[stage] += 1

    def _workers(self, stage: str) -> int:
        need, placed = self._added[stage]
        return sum(_holds(has, need) for has in placed.values())

    def _place(self, need: Need, free: dict[str, dict[str, float]]) -> dict[str, dict[str, float]] | None:
        """Take a need's workers from what is free, on as few nodes as it goes; None where they do not fit."""
        if need.node is not None:
            has = self._there[need.node]
            whole = {name: has.get(name, 0.0) for name in ("CPU", "GPU")}
            if any(free[need.node][name] + SLACK < amount for name, amount in whole.items()):
                return None
            free[need.node] = dict.fromkeys(whole, 0.0)
            return {need.node: whole}
        placed: dict[str, dict[str, float]] = {}
        missing = need.workers
        for node in sorted(free, key=lambda node: -_holds(free[node], need)):
            count = min(missing, _holds(free[node], need))
            if count:
                _take(free[node], _put(placed, node, {"CPU": count * need.cpus, "GPU": count * need.gpus}))
                missing -= count
        return placed if not missing else None

    def _with_the_rest(self, placed: Mapping[str, Mapping[str, float]]) -> Share:
        """With the nodes' other resources, which are not counted: memory, labels."""
        return {node: {**self._there[node], **used} for node, used in placed.items()}


def _holds(has: Mapping[str, float], need: Need) -> int:
    """How many workers of a need fit into this."""
    pairs = [(has["CPU"], need.cpus), (has["GPU"], need.gpus)]
    return min((int(have / wanted + SLACK) for have, wanted in pairs if wanted), default=need.workers)


def _take(has: dict[str, float], used: Mapping[str, float]) -> None:
    for name in ("CPU", "GPU"):
        has[name] = max(0.0, has[name] - used.get(name, 0.0))


def _put(placed: dict[str, dict[str, float]], node: str, more: Mapping[str, float]) -> Mapping[str, float]:
    """Add to what a stage has of a node; returns what was added."""
    has = placed.setdefault(node, {"CPU": 0.0, "GPU": 0.0})
    for name, amount in more.items():
        has[name] += amount
    return more


def _total(there: Share, name: str) -> float:
    return sum(node.get(name, 0.0) for node in there.values())


def _cpus_beside(gpus: float, there: Share) -> float:
    """The CPUs that go with a worker's GPUs: its part of those of a node, in whole CPUs."""
    ratios = [has.get("CPU", 0.0) / has["GPU"] for has in there.values() if has.get("GPU")]
    return max(1.0, math.floor(gpus * min(ratios, default=0.0) + SLACK))
