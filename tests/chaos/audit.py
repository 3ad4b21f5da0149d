"""Watches a store while processes are killed: what was committed stays as it was, and whole."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.store.store import ArtifactStore
from tests.faults.runs import Contents, Differences, read_store


@dataclass
class Audit:
    """One store's history, looked at after every kill and at the end of its run."""

    store: str  # what to call it
    address: str
    committed: dict[str, str] = field(default_factory=dict)  # artifact -> checksum of its manifest, as first seen
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    half_visible: list[str] = field(default_factory=list)

    def look(self) -> None:
        """Note what is new, read it whole, and check that nothing seen before has gone or was replaced."""
        store = ArtifactStore(self.address)
        self.half_visible += [f"{self.store}: {damage}" for damage in store.damaged()]
        there = {artifact.name: artifact for artifact in store.artifacts()}
        for name, checksum in self.committed.items():
            if name not in there:
                self.lost.append(f"{self.store}: {name} was committed, and has gone")
            elif there[name].manifest.checksum != checksum:
                self.doubled.append(f"{self.store}: {name} was committed twice")
        for name in there.keys() - self.committed.keys():
            self.half_visible += [f"{self.store}: {damage}" for damage in store.verify(there[name])]
        self.committed = {name: artifact.manifest.checksum for name, artifact in there.items()}

    def written(self) -> int:
        """A number that changes whenever the run has written something that it would continue from."""
        objects = ArtifactStore(self.address).objects
        return hash(tuple((one.path, one.size) for one in objects.walk("") if not one.path.startswith(".tessera/")))

    def close(self, expected: Contents) -> Differences:
        """What is wrong with the store of a run that has ended, beside an undisturbed run's."""
        self.look()
        found = read_store(self.address).against(expected)
        return Differences(
            self.lost + [f"{self.store}: {name}" for name in found.lost],
            self.doubled + [f"{self.store}: {name}" for name in found.doubled],
            sorted({*self.half_visible, *(f"{self.store}: {damage}" for damage in found.half_visible)}),
            [f"{self.store}: {file}" for file in found.differing],
        )
