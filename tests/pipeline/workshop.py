"""A folder with a source, a pipeline file of fake stages, and the means to run `tessera` on it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
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


def _accept_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def timed(command: list[str]) -> tuple[str, float]:
    """Run a command to its end; returns what it printed, and the processor time that it took in seconds.

    Processor time does not depend on what else the machine does.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return shown.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


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
    started: list[subprocess.Popen[str]] = field(default_factory=list)

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
            "TESSERA_STATE": str(self.folder / "state"),
        }

    def start(self, *arguments: str, group: bool = False) -> subprocess.Popen[str]:
        """Start the command in another process; with `group`, in a process group of its own."""
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.cli", *arguments],
            cwd=self.folder,
            env={**os.environ, **self.environment(), **self.extra},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=group,
            # In a shell's background job, and so in its children, Ctrl-C is ignored: the tests may run in one.
            preexec_fn=_accept_interrupts,
        )
        self.started.append(process)
        return process

    def close(self) -> None:
        """End the processes that a failed test has left running."""
        for process in self.started:
            process.kill()
            process.communicate()

    def outside(self, *arguments: str, code: int = 0, seconds: float = 300.0) -> Shown:
        """Run the command in another process, to its end."""
        process = self.start(*arguments)
        output, errors = process.communicate(timeout=seconds)
        assert process.returncode == code, f"exit {process.returncode}, expected {code}\n{output}\n{errors}"
        return Shown(output, errors)

    def tessera(self, *arguments: str, code: int = 0) -> Shown:
        """Run the command in this process, whose working folder is the workshop's."""
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

    def wait_for(self, stage: str, seconds: float = 240.0) -> None:
        """Wait until `stage` has begun."""
        end = time.monotonic() + seconds
        while stage not in self.ran:
            assert time.monotonic() < end, f"{stage} did not begin within {seconds} s; ran {self.ran}"
            time.sleep(0.02)
