"""A workshop whose pipeline trains and judges, and one Ray for all sweeps of a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import registry
from pipeline.run import cluster
from tests.pipeline.workshop import FAKES, Workshop

PIPELINE = """
store: store
tracking: {tracking}
stages:
  numbers: {{uses: fake_numbers, source: numbers.txt}}
  scaled: {{uses: fake_scaled, numbers: numbers}}
  training: {{uses: fake_training, numbers: scaled}}
  judge: {{uses: fake_judge, of: training}}
  side: {{uses: fake_judge, of: training}}
"""
NEAR = "stages.training.weights.near"
SPACE: dict[str, Any] = {"objective": "judge.score", "space": {NEAR: {"uniform": [0, 6]}}, "trials": 3}


@dataclass
class Sweeps:
    """Sweeps in a workshop; JSON is YAML, so a space is written as it is."""

    workshop: Workshop

    def write(self, space: dict[str, Any], name: str = "s.yaml") -> str:
        (self.workshop.folder / name).write_text(json.dumps(space))
        return name

    def run(self, space: dict[str, Any], *options: str, code: int = 0) -> Any:
        """The result of a sweep."""
        shown = self.workshop.tessera("sweep", "p.yaml", "--space", self.write(space), "--json", *options, code=code)
        return json.loads(shown.stdout)

    def said(self, space: dict[str, Any], *options: str, code: int = 0) -> str:
        """What a sweep says on standard error."""
        return self.workshop.tessera("sweep", "p.yaml", "--space", self.write(space), *options, code=code).stderr

    def ran(self) -> list[str]:
        """The stage runs so far: the first words of the fakes' log."""
        return [line.split(" pid=")[0] for line in self.workshop.ran]


def prepare_folder(folder: Path, patch: pytest.MonkeyPatch) -> Workshop:
    """A workshop with the pipeline above, as the working folder of this process."""
    workshop = Workshop(folder)
    workshop.write(PIPELINE)
    for name, value in workshop.environment().items():
        patch.setenv(name, value)
    patch.delenv("RAY_ADDRESS", raising=False)
    patch.chdir(folder)
    patch.syspath_prepend(FAKES)
    registry._entries.cache_clear()
    return workshop


@pytest.fixture
def sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sweeps]:
    """Sweeps in a folder of the test's own."""
    workshop = prepare_folder(tmp_path, monkeypatch)
    yield Sweeps(workshop)
    workshop.close()
    registry._entries.cache_clear()


@pytest.fixture(scope="module")
def on_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Sweeps]]:
    """`on_ray()` empties the folder, and gives sweeps whose trials use the file's one Ray."""
    folder = tmp_path_factory.mktemp("sweeps")
    with pytest.MonkeyPatch.context() as patch:
        workshop = prepare_folder(folder, patch)
        started = cluster.start("local")

        def fresh() -> Sweeps:
            import shutil

            for entry in list(folder.iterdir()):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            workshop.__post_init__()
            workshop.write(PIPELINE)
            return Sweeps(workshop)

        yield fresh
        cluster.stop(started)
        workshop.close()
        registry._entries.cache_clear()
