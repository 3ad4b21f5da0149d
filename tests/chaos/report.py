"""The figures of the long test: as they grow, in a table at the end, and as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.kills import KINDS
from tests.faults.runs import Differences

NAMES = {"store": "store (the gateway to it, with the requests under way)"}


@dataclass
class Report:
    """What has happened so far; every event is also a line of `events.jsonl`."""

    folder: Path
    kills: int
    seed: int
    began: float = field(default_factory=time.monotonic)
    killed: Counter[str] = field(default_factory=Counter)
    repeated: Counter[str] = field(default_factory=Counter)  # commands given again, by the last kill before
    stopped: list[str] = field(default_factory=list)  # runs that ended with an error, or not at all, without a kill
    completed: int = 0
    reference_seconds: float = 0.0
    wrong: Differences = field(default_factory=Differences)

    def event(self, what: str, **facts: Any) -> None:
        """Print and keep one line."""
        seconds = time.monotonic() - self.began
        print(f"{seconds:7.1f} s  {what}", flush=True)
        with (self.folder / "events.jsonl").open("a") as file:
            file.write(json.dumps({"seconds": round(seconds, 2), "event": what, **facts}) + "\n")

    def add(self, found: Differences) -> None:
        """The end of a run."""
        self.wrong.lost += found.lost
        self.wrong.doubled += found.doubled
        self.wrong.half_visible += found.half_visible
        self.wrong.differing += found.differing

    @property
    def good(self) -> bool:
        """Whether every run completed, and nothing is wrong with what they made."""
        return not self.wrong and not self.stopped and self.killed.total() >= self.kills and self.completed > 0

    def rows(self) -> list[tuple[str, str]]:
        """The table's."""
        wrong = {name.replace("_", "-"): len(found) for name, found in asdict(self.wrong).items()}
        return [
            *((f"kills: {NAMES.get(kind, kind)}", str(self.killed[kind])) for kind in KINDS),
            ("kills", f"{self.killed.total()} of {self.kills}, seed {self.seed}"),
            ("runs completed", str(self.completed)),
            ("commands repeated", ", ".join(f"{n} after {kind}" for kind, n in self.repeated.most_common()) or "0"),
            ("runs that stopped without a kill", str(len(self.stopped))),
            ("lost artifacts", str(wrong["lost"])),
            ("doubled artifacts", str(wrong["doubled"])),
            ("half-visible artifacts", str(wrong["half-visible"])),
            ("files that differ from an undisturbed run's", str(wrong["differing"])),
            ("time", f"{(time.monotonic() - self.began) / 60:.1f} min"),
        ]

    def close(self) -> None:
        """Print the table and what is wrong, and write `figures.json`."""
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        print("\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows))
        for kind, found in {**asdict(self.wrong), "stopped": self.stopped}.items():
            for one in found:
                print(f"{kind}: {one}", file=sys.stderr)
        figures = {
            "seed": self.seed,
            "kills": dict(self.killed),
            "runs_completed": self.completed,
            "commands_repeated": dict(self.repeated),
            "stopped_without_a_kill": self.stopped,
            **asdict(self.wrong),
            "seconds": round(time.monotonic() - self.began, 1),
            "undisturbed_seconds": round(self.reference_seconds, 1),
            "good": self.good,
        }
        (self.folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
        print(f"\n{'all survived' if self.good else 'NOT survived'}; figures, events and logs: {self.folder}")
