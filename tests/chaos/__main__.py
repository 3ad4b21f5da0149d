"""A long random test of faults: `python -m tests.chaos --kills 100 --seed 1`.

The quickstart, shortened, runs again and again on a cluster of two nodes, with its store and source on S3 and an MLflow
server, each time into an empty store, while processes are killed with -9: the driver, workers of Ray Data and of
training, raylets, the head, the store's gateway, the tracking server. A run that ends is started again by the same
command. Everything that the runs made is compared with what an undisturbed run made. Exit code 0 when nothing was lost,
doubled, half-visible or different; 1 when something was, or the test was interrupted.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path

from tests.chaos.audit import Audit
from tests.chaos.kills import CHEAP, Killer, make_deck
from tests.chaos.report import Report
from tests.chaos.world import World, started_world
from tests.faults.runs import Contents, Run, read_store

# Seconds from one kill to the next; a kill that costs much waits, up to PATIENCE, until the run has written something.
PAUSE = (1.0, 6.0)
PATIENCE = 60.0
SILENCE = 420.0  # seconds without kills in which a run must end or write something
NO_END = 120.0  # seconds in which a driver must notice that its head has gone
STOPS = 3  # runs that do not complete, after which the test ends
ENDS = 8  # of one run with an error, one after the other without a kill between: it will not complete


def main() -> int:
    """Run the test; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="how many (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of what is killed when (default 0)")
    parser.add_argument("--output", type=Path, default=None, help="folder of logs and figures (default .tessera/chaos)")
    chosen = parser.parse_args()
    folder = (chosen.output or Path(".tessera/chaos") / time.strftime("%Y%m%d-%H%M%S")).absolute()
    folder.mkdir(parents=True)
    report = Report(folder, chosen.kills, chosen.seed)
    try:
        with started_world(folder) as world:
            report.event(f"two nodes at {world.cluster.address}, logs in {folder}")
            _Chaos(world, report, random.Random(chosen.seed)).run()
    except KeyboardInterrupt:
        report.event("interrupted")
    finally:
        report.close()
    return 0 if report.good else 1


class _Chaos:
    """The runs, one after the other."""

    def __init__(self, world: World, report: Report, chance: random.Random) -> None:
        self.world, self.report, self.chance = world, report, chance
        self.deck = make_deck(report.kills, chance)
        self.killer = Killer(world, chance)
        self.last = "nothing"  # the kind of the last kill

    def run(self) -> None:
        expected = self._undisturbed()
        number = 0
        while self.deck:
            number += 1
            audit = Audit(f"run-{number}")
            if not self._disturbed(audit):
                if len(self.report.stopped) == STOPS:
                    return
                continue
            self.killer.wait()
            found = audit.close(expected)
            self.report.add(found)
            self.report.completed += 1
            self.report.event(f"{audit.store} completed, {'WRONG: ' + str(found) if found else 'as undisturbed'}")

    def _undisturbed(self) -> Contents:
        began = time.monotonic()
        run = self.world.drive("undisturbed")
        try:
            run.finish(1200)
        finally:
            run.kill()
        self.report.reference_seconds = time.monotonic() - began
        expected = read_store(Audit("undisturbed").address)
        self.report.event(
            f"an undisturbed run: {len(expected.files)} artifacts", seconds_of_it=self.report.reference_seconds
        )
        return expected

    def _disturbed(self, audit: Audit) -> bool:
        """One run from an empty store to its end. Returns False where it cannot be completed."""
        run, ends, progress = self.world.drive(audit.store), 0, 0
        next_kill, wrote, quiet_since = time.monotonic() + self.chance.uniform(*PAUSE), True, time.monotonic()
        noticed_by: float | None = None  # when the driver must have ended, after its head has gone
        try:
            while True:
                time.sleep(0.1)
                now = time.monotonic()
                if (code := run.process.poll()) is not None:
                    if code == 0:
                        return True
                    ends += 1
                    if ends > ENDS:
                        return self._give_up(audit, f"ended {ends} times with an error and no kill: {run.text[-600:]}")
                    self.report.repeated[self.last] += 1
                    self.report.event(f"the run ended ({code}) after a kill of {self.last}; the command is repeated")
                    self.killer.wait()
                    run, noticed_by = self.world.drive(audit.store), None
                    quiet_since = now
                    continue
                if noticed_by is not None and now > noticed_by:
                    return self._give_up(audit, f"goes on {NO_END:g} s after its head was killed")
                if now - quiet_since > SILENCE:
                    return self._give_up(audit, f"has written nothing for {SILENCE:g} s")
                if int(now) != int(now - 0.1) and (seen := audit.progress()) != progress:
                    wrote, progress, quiet_since = True, seen, now
                if now < next_kill or not self.deck:
                    continue
                kind = next(
                    (
                        kind
                        for kind in self.deck
                        if (kind in CHEAP or kind == "tracking" or wrote or now > next_kill + PATIENCE)
                        and self.killer.possible(kind, run)
                    ),
                    None,
                )
                if kind is None or (what := self.killer.kill(kind, run)) is None:
                    continue
                self.deck.remove(kind)
                self.report.killed[kind] += 1
                self.last, ends = kind, 0
                self.report.event(f"kill {self.report.killed.total()}: {what}", kind=kind, run=audit.store)
                if kind not in CHEAP and kind != "tracking":
                    wrote = False
                if kind == "head" and run.process.poll() is None:
                    noticed_by = now + NO_END
                audit.look()
                quiet_since = time.monotonic()
                next_kill = time.monotonic() + self.chance.uniform(*PAUSE)
        finally:
            run.kill()
            self._end_of(run)

    def _give_up(self, audit: Audit, why: str) -> bool:
        self.report.stopped.append(f"{audit.store} {why}")
        self.report.event(f"{audit.store} {why}")
        return False

    def _end_of(self, run: Run) -> None:
        try:
            run.process.wait(30)
        except subprocess.TimeoutExpired:
            self.report.event("a driver did not end")


if __name__ == "__main__":
    sys.exit(main())
