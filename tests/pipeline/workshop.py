"""A folder with a source, a pipeline file of fake stages, and the means to run `tessera` on it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.cli.main import main

FAKES = Path(__file__).parent / "fakes"
PIPELINE = """
store: store
tracking: {tracking}
stages:
  numbers: {{uses: fake_numbers, source: numbers.txt}}
  scaled: {{uses: fake_scaled, numbers: numbers}}
  encoder: {{uses: fake_encoder, numbers: scaled}}
  score: {{uses: fake_score, of: encoder}}
"""


def _hear_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True)
class Shown:
    """What a command printed."""

    stdout: str
    stderr: str


@dataclass
class Workshop:
    """Commands run in `folder`; the environment names the fakes and their log."""

    folder: Path
    extra: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.folder / "numbers.txt").write_text("1\n2\n3\n")
        self.write()

    def write(self, text: str = PIPELINE, tracking: str = "null") -> None:
        (self.folder / "p.yaml").write_text(text.format(tracking=tracking))

    @property
    def hold(self) -> Path:
        return self.folder / "hold"

    @property
    def ran(self) -> list[str]:
        """Stages that were really executed, in order."""
        log = self.folder / "log"
        return [line.removeprefix("run ") for line in log.read_text().split("\n") if line] if log.exists() else []

    def environment(self) -> dict[str, str]:
        return {
            "PYTHONPATH": str(FAKES),
            "TESSERA_FAKES_LOG": str(self.folder / "log"),
            "TESSERA_FAKES_HOLD": str(self.hold),
            "TESSERA_CACHE": str(self.folder / "cache"),
        }

    def start(self, *arguments: str, group: bool = False) -> subprocess.Popen[str]:
        """The command in a process of its own; with `group`, in a process group of its own too."""
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline.cli", *arguments],
            cwd=self.folder,
            env={**os.environ, **self.environment(), **self.extra},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=group,
            # A shell starts its background jobs deaf to Ctrl-C, and children inherit it: the tests may run in one.
            preexec_fn=_hear_interrupts,
        )

    def outside(self, *arguments: str, code: int = 0, seconds: float = 120.0) -> Shown:
        """Run the command in a process of its own to its end."""
        process = self.start(*arguments)
        output, errors = process.communicate(timeout=seconds)
        assert process.returncode == code, f"exit {process.returncode}, expected {code}\n{output}\n{errors}"
        return Shown(output, errors)

    def tessera(self, *arguments: str, code: int = 0) -> Shown:
        """Run the command in this process, which is in the folder already (the fixture sees to it)."""
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            returned = main(arguments)
        shown = Shown(output.getvalue(), errors.getvalue())
        assert returned == code, f"exit {returned}, expected {code}\n{shown.stdout}\n{shown.stderr}"
        return shown

    def json(self, *arguments: str, code: int = 0) -> Any:
        return json.loads(self.tessera(*arguments, "--json", code=code).stdout)

    def states(self, *arguments: str, code: int = 0) -> dict[str, str]:
        return {stage["name"]: stage["state"] for stage in self.json(*arguments, code=code)["stages"]}

    def wait_for(self, stage: str, seconds: float = 60.0) -> None:
        """Until `stage` has begun."""
        end = time.monotonic() + seconds
        while stage not in self.ran:
            assert time.monotonic() < end, f"{stage} did not begin within {seconds} s; ran {self.ran}"
            time.sleep(0.02)
