"""One run of the pipeline, from an empty store to its end, with processes killed on the way."""

from __future__ import annotations

import time

from tests.chaos.audit import Audit
from tests.chaos.kills import QUICK, RARE, Killer
from tests.chaos.report import Report
from tests.chaos.world import World
from tests.faults.runs import Run

# Seconds from one kill to the next. After a kill that costs much, the next of these waits until the run has written
# something, but no longer than PATIENCE.
PAUSE = (1.0, 6.0)
PATIENCE = 120.0
SILENCE = 600.0  # seconds without a kill in which a run must write something
NO_HEAD = 240.0  # seconds in which a driver must end whose head has gone; pipeline/run/head_watch.py takes 135
ENDS = 5  # with an error, one after the other without a kill between: the run will not complete


class Stopped(Exception):
    """The run does not go on, or ends again and again, though nothing is killed."""


class Disturbed:
    """The run.

    Args:
        world: to run in.
        killer: of that world.
        report: told about kills and repeated commands.
        audit: of the run's store.
        deck: kinds to kill; those that were are taken off it.
    """

    def __init__(self, world: World, killer: Killer, report: Report, audit: Audit, deck: list[str]) -> None:
        self.world, self.killer, self.report, self.audit, self.deck = world, killer, report, audit, deck
        self.driver: Run = world.drive(audit.store)
        self.last = "nothing"  # the kind of the last kill
        self.ends = 0  # of the driver with an error, since the last kill
        self.written = 0  # changes with what the run has written
        self.has_written = True  # since the last kill that cost much
        self.heard = self.looked = time.monotonic()
        self.next_kill = self.heard + self.killer.chance.uniform(*PAUSE)
        self.headless: float | None = None  # when the head was killed under this driver

    def run(self) -> None:
        """Kill, and give the command again when it has ended, until it ends well.

        Raises:
            Stopped: the run does not get to its end.
        """
        try:
            while not self._has_ended():
                self._watch()
                if self.deck and time.monotonic() > self.next_kill:
                    self._kill()
                time.sleep(0.3)
        finally:
            self.driver.kill()

    def _has_ended(self) -> bool:
        """Whether the driver has ended well; one that has not is started again."""
        code = self.driver.process.poll()
        if code is None or code == 0:
            return code == 0
        self.ends += 1
        if self.ends > ENDS:
            raise Stopped(f"ended {self.ends} times with an error, with no kill between: {self.driver.text[-600:]}")
        self.report.repeated[self.last] += 1
        self.report.event(f"the run ended ({code}), last kill: {self.last}; the command is repeated")
        self.killer.wait("head")  # a cluster to join; the store and the server may still be away
        self.driver, self.headless, self.heard = self.world.drive(self.audit.store), None, time.monotonic()
        return False

    def _watch(self) -> None:
        """Now and then, look whether the run goes on."""
        now = time.monotonic()
        if now - self.looked < 2:
            return
        self.looked = now
        if (written := self.audit.written()) != self.written:
            self.written, self.has_written, self.heard = written, True, now
        if self.headless is not None and now - self.headless > NO_HEAD:
            raise Stopped(f"has not ended {NO_HEAD:g} s after its head was killed")
        if now - self.heard > SILENCE:
            raise Stopped(f"has written nothing for {SILENCE:g} s")

    def _kill(self) -> None:
        """Kill the first of the deck that is there to be killed; what is seldom there goes first."""
        self.killer.look()
        settled = self.has_written or time.monotonic() > self.next_kill + PATIENCE
        ready = sorted((kind for kind in self.deck if settled or kind in QUICK), key=lambda kind: kind not in RARE)
        kind = next((kind for kind in ready if self.killer.possible(kind, self.driver)), None)
        if kind is None or (what := self.killer.kill(kind, self.driver)) is None:
            return
        self.deck.remove(kind)
        self.report.killed[kind] += 1
        self.report.event(f"kill {self.report.killed.total()}: {what}", kind=kind, run=self.audit.store)
        self.last, self.ends = kind, 0
        self.has_written = self.has_written and kind in QUICK
        if kind == "head" and self.driver.process.poll() is None:
            self.headless = time.monotonic()
        self.audit.look()
        self.heard = time.monotonic()
        self.next_kill = self.heard + self.killer.chance.uniform(*PAUSE)
