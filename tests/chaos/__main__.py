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
import sys
import time
from pathlib import Path

from tests.chaos.audit import Audit
from tests.chaos.disturbed import Disturbed, Stopped
from tests.chaos.kills import Killer, make_deck
from tests.chaos.report import Report
from tests.chaos.world import World, started_world
from tests.faults.runs import Contents, read_store

LONGEST = 1800.0  # seconds of the undisturbed run
STOPS = 3  # runs that do not complete, after which the test ends


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
            _run(world, report)
    except KeyboardInterrupt:
        report.event("interrupted")
    finally:
        report.close()
    return 0 if report.good else 1


def _run(world: World, report: Report) -> None:
    """One run after the other, until there was the last kill."""
    chance = random.Random(report.seed)
    deck, killer = make_deck(report.kills, chance), Killer(world, chance)
    expected = _undisturbed(world, report)
    number = 0
    while deck and len(report.stopped) < STOPS:
        number += 1
        audit = Audit(f"run-{number}", world.address(f"run-{number}"))
        try:
            Disturbed(world, killer, report, audit, deck).run()
        except Stopped as stopped:
            report.stopped.append(f"{audit.store} {stopped}")
            report.event(f"{audit.store} {stopped}")
            continue
        killer.wait()
        found = audit.close(expected)
        report.add(found)
        report.completed += 1
        report.event(f"{audit.store} completed: {f'WRONG: {found}' if found else 'as undisturbed'}")


def _undisturbed(world: World, report: Report) -> Contents:
    began = time.monotonic()
    run = world.drive("undisturbed")
    try:
        run.finish(LONGEST)
    finally:
        run.kill()
    report.reference_seconds = time.monotonic() - began
    expected = read_store(world.address("undisturbed"))
    report.event(f"an undisturbed run made {len(expected.files)} artifacts in {report.reference_seconds:.0f} s")
    return expected


if __name__ == "__main__":
    sys.exit(main())
