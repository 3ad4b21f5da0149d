"""What is known of a sweep's trials, kept in the store, so that a sweep that was killed continues.

    sweeps/<id>/sweep            what it is: the space, the pipeline's name
    sweeps/<id>/trial-0007       one trial, replaced whenever one of its rungs is finished
    sweeps/last/<pipeline>       the sweep that was last begun for a pipeline

Only the driver writes them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pipeline.run.tracking import flatten

if TYPE_CHECKING:
    from pipeline.store.store import ArtifactStore

FOLDER = "sweeps"
State = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Rung:
    """What one look at a trial has found."""

    index: int
    steps: int | None  # of the training; None: to its end
    by_seed: list[float]  # the objective
    seconds: float = 0.0  # that it took in the trial's process
    stages: Mapping[str, float] = field(default_factory=dict)  # stage -> seconds, of those that were computed
    artifacts: list[str] = field(default_factory=list)  # the objective's, one a seed

    @property
    def value(self) -> float:
        """The mean over the seeds."""
        return sum(self.by_seed) / len(self.by_seed)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None with one seed."""
        if len(self.by_seed) < 2:
            return None
        squares = sum((value - self.value) ** 2 for value in self.by_seed)
        return float((squares / (len(self.by_seed) - 1)) ** 0.5)


@dataclass
class Trial:
    """One setting, and how far it has come."""

    number: int
    values: dict[str, Any]  # dotted path -> value
    state: State = "running"
    rungs: list[Rung] = field(default_factory=list)
    error: str = ""
    trace: str = ""  # of a bug
    warnings: list[str] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Whether nothing of it is left to do. What failed is tried again: a full disk may be empty by then."""
        return self.state in ("finished", "stopped")

    @property
    def seconds(self) -> float:
        """All its rungs together."""
        return sum(rung.seconds for rung in self.rungs)

    def to_json(self) -> dict[str, Any]:
        """As it is kept."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Trial:
        """Read what `to_json` wrote."""
        return cls(**{**value, "rungs": [Rung(**rung) for rung in value["rungs"]]})


class Records:
    """The records of one sweep."""

    def __init__(self, store: ArtifactStore, sweep: str, pipeline: str) -> None:
        self.store, self.sweep = store, sweep
        tail = hashlib.sha256(pipeline.encode()).hexdigest()[:12]
        self._last = f"{FOLDER}/last/{re.sub(r'[^a-z0-9_-]+', '-', pipeline.lower())[:60]}-{tail}"

    def trials(self) -> list[Trial]:
        """Every trial that was begun, by number."""
        from pipeline.store.records import records_in

        found = [value for name, value in records_in(self.store.objects, f"{FOLDER}/{self.sweep}") if "number" in value]
        return sorted(map(Trial.from_json, found), key=lambda trial: trial.number)

    def keep(self, trial: Trial) -> None:
        """Replace the record of a trial."""
        self.store.write_record(f"{FOLDER}/{self.sweep}/trial-{trial.number:04}", trial.to_json())

    def begin(self, identity: Mapping[str, Any]) -> list[str] | None:
        """Note that this sweep is the pipeline's last one.

        Args:
            identity: what makes it this sweep, in JSON's types.

        Returns:
            None for the pipeline's first sweep, and for its last one continued. Else the dotted paths of what differs
            in the space; none where the pipeline differs.
        """
        before = self.store.read_record(self._last)
        self.store.write_record(self._last, {"sweep": self.sweep, "identity": dict(identity)})
        self.store.write_record(f"{FOLDER}/{self.sweep}/sweep", {"identity": dict(identity)})
        if before is None or before.get("sweep") == self.sweep:
            return None
        old, new = flatten(before["identity"]), flatten(identity)
        return [path for path in dict.fromkeys([*new, *old]) if old.get(path) != new.get(path)]
