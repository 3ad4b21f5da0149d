"""What can be killed, how, and how it comes back."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psutil

from tests.chaos.world import World
from tests.cluster import title_of
from tests.faults.runs import Run

KINDS = ("driver", "data worker", "training worker", "raylet", "head", "store", "tracking")
MORE = ("data worker", "store")  # kills beyond a tenth of each kind are of these
QUICK = (*MORE, "tracking")  # little is computed again after one of these
RARE = ("training worker",)  # there only while a training runs, and a run that is often disturbed seldom gets so far
DATA_WORKERS = ("MapBatches", "MapWorker", "_check_remote", "put_numbered")
TRAINING_WORKER = "TrainWorker"


def make_deck(kills: int, chance: random.Random) -> list[str]:
    """The kinds of all kills in random order: of each at least a tenth."""
    least = max(1, -(-kills // 10))
    deck = [kind for kind in KINDS for _ in range(least)]
    deck += [MORE[number % len(MORE)] for number in range(kills - len(deck))]
    chance.shuffle(deck)
    return deck[:kills]


@dataclass
class Killer:
    """Kills parts of a world, and starts again what was killed, in threads of its own."""

    world: World
    chance: random.Random
    healing: dict[str, threading.Thread] = field(default_factory=dict)
    errors: list[BaseException] = field(default_factory=list)
    workers: list[psutil.Process] = field(default_factory=list)

    def heals(self, *parts: str) -> bool:
        """Whether one of these parts is still being started again."""
        return any(part in self.healing and self.healing[part].is_alive() for part in parts)

    def look(self) -> None:
        """Note which workers there are; `possible` and `kill` choose among them."""
        self.workers = self.world.cluster.workers() if not self.heals("head") else []

    def targets(self, kind: str) -> list[psutil.Process]:
        """The workers of this kind, as of the last look."""
        names: Sequence[str] = DATA_WORKERS if kind == "data worker" else (TRAINING_WORKER,)
        return [process for process in self.workers if any(name in title_of(process) for name in names)]

    def possible(self, kind: str, run: Run) -> bool:
        """Whether there is something of this kind that runs."""
        if self.heals("head") or run.process.poll() is not None:
            return False
        if kind in ("data worker", "training worker"):
            return bool(self.targets(kind))
        if kind == "raylet":
            return not self.heals("raylet") and self.world.cluster.nodes[1].running
        return not self.heals(kind, *(["raylet"] if kind == "head" else []))

    def kill(self, kind: str, run: Run) -> str | None:
        """Kill one. Returns what it was, or None when it ended by itself before."""
        return {
            "driver": self._driver,
            "data worker": self._worker,
            "training worker": self._worker,
            "raylet": self._raylet,
            "head": self._head,
            "store": self._store,
            "tracking": self._tracking,
        }[kind](kind, run)

    def wait(self, *parts: str) -> None:
        """Wait until these parts, or all, are there again.

        Raises:
            RuntimeError: a part did not start.
        """
        for part in parts or KINDS:
            if part in self.healing:
                self.healing[part].join()
        if self.errors:
            raise RuntimeError(f"a part of the test's own world did not start: {self.errors[0]}") from self.errors[0]

    def _driver(self, kind: str, run: Run) -> str | None:
        run.kill()
        return "driver"

    def _worker(self, kind: str, run: Run) -> str | None:
        if not (targets := self.targets(kind)):
            return None
        victim = self.chance.choice(targets)
        title = title_of(victim)
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            return None
        return title

    def _raylet(self, kind: str, run: Run) -> str | None:
        """The second node: all of it at once, or its raylet alone."""
        cluster = self.world.cluster
        alone = self.chance.random() < 0.5
        if not alone:
            cluster.kill_node(1)
        elif (raylet := cluster.nodes[1].raylet()) is not None:
            raylet.kill()
        else:
            return None
        self._heal("raylet", lambda: cluster.restart_node(1), 0.0 if not alone else 2.0)
        return "raylet" if alone else "whole node"

    def _head(self, kind: str, run: Run) -> str | None:
        """The head's machine: also the driver on it, or all but the driver."""
        cluster = self.world.cluster
        with_driver = self.chance.random() < 0.5
        cluster.kill_head()
        if with_driver:
            run.kill()
        self._heal("head", cluster.restart_head, 0.0)
        return "head and driver" if with_driver else "head"

    def _store(self, kind: str, run: Run) -> str | None:
        self.world.gateway.kill()
        self._heal("store", self.world.gateway.start, self.chance.uniform(0.1, 4))
        return "gateway of the store"

    def _tracking(self, kind: str, run: Run) -> str | None:
        self.world.tracking.kill()
        self._heal("tracking", self.world.tracking.start, self.chance.uniform(0.1, 4))
        return "tracking server"

    def _heal(self, part: str, start: Callable[[], None], after: float) -> None:
        def heal() -> None:
            time.sleep(after)
            try:
                start()
            except BaseException as error:
                self.errors.append(error)

        if part in self.healing:
            self.healing[part].join()
        self.healing[part] = threading.Thread(target=heal, name=f"heal-{part}", daemon=True)
        self.healing[part].start()
