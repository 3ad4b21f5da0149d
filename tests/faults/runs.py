"""Runs of `tessera` on a test's cluster, and what their stores hold, compared with an undisturbed run's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore

ROOT = Path(__file__).parents[2]


class Run:
    """A `tessera` process.

    Args:
        arguments: of the command.
        environment: beside this process's.
        log: file for what it prints.
        module: that is the command.
    """

    def __init__(
        self, arguments: list[str], environment: Mapping[str, str], log: Path, module: str = "tests.faults.few_on_ray"
    ) -> None:
        self.log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """`kill -9` of the process alone: what it has started has to notice."""
        self.process.kill()
        self.process.wait()

    def finish(self, seconds: float = 300) -> None:
        """Wait for an end without error."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the run has not ended within {seconds:g} s:\n{self.text[-3000:]}") from None
        assert code == 0, self.text[-3000:]

    def wait_for(self, text: str, seconds: float = 180) -> None:
        """Wait until it has printed this."""
        end = time.monotonic() + seconds
        while text not in self.text:
            assert self.process.poll() is None, self.text[-3000:]
            assert time.monotonic() < end, self.text[-3000:]
            time.sleep(0.05)


@dataclass
class Contents:
    """What a store holds: every artifact's files, and what is wrong with it."""

    files: dict[str, dict[str, str]] = field(default_factory=dict)  # "kind/fingerprint" -> file -> what it holds
    rows: dict[str, int] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)

    def against(self, expected: Contents) -> Differences:
        """How this store differs from another, which holds at least as much."""
        found, wanted = set(self.files), set(expected.files)
        differ = [
            f"{name}/{file}"
            for name in sorted(found & wanted)
            for file in sorted(set(self.files[name]) | set(expected.files[name]))
            if self.files[name].get(file) != expected.files[name].get(file)
        ]
        rows = {name for name in found & wanted if self.rows[name] != expected.rows[name]}
        return Differences(sorted(wanted - found), sorted(found - wanted | rows), self.damaged, differ)


@dataclass
class Differences:
    """What may not be after faults; all are empty where they were survived."""

    lost: list[str] = field(default_factory=list)  # artifacts that the undisturbed run has
    doubled: list[str] = field(default_factory=list)  # artifacts or rows that it has not
    half_visible: list[str] = field(default_factory=list)  # artifacts with a manifest whose files are not what it says
    differing: list[str] = field(default_factory=list)  # files

    def __bool__(self) -> bool:
        return bool(self.lost or self.doubled or self.half_visible or self.differing)


def read_store(address: str) -> Contents:
    """All artifacts of a store, each of their files read and checked."""
    store, found = ArtifactStore(address), Contents()
    found.damaged += map(str, store.damaged())
    for artifact in store.artifacts():
        if damages := store.verify(artifact):
            found.damaged += map(str, damages)
            continue
        names = [entry.name for entry in artifact.manifest.files if entry.name != "curves.parquet"]
        found.files[artifact.name] = {name: _holds(artifact, name) for name in names}
        found.rows[artifact.name] = artifact.rows
    return found


def _holds(artifact: Artifact, name: str) -> str:
    """The file's checksum, or for the curves of a training their values without speeds and times."""
    if name != "curves.json":
        return artifact.file(name).sha256
    rows = json.loads(artifact.read(name))
    return json.dumps([{key: row[key] for key in sorted(row) if not key.endswith("_s")} for row in rows])
