"""Seconds from the command to the first training step, and of the whole quickstart, by phase.

    python -m tests.benchmarks.startup --against ../other --rounds 3 --write           # the stage `warmup` alone
    python -m tests.benchmarks.startup --whole --against ../other --rounds 3 --write   # all of configs/quickstart.yaml

A run is what a user types, in a process of its own, with a fresh store and a fresh MLflow database. `--against` names
another checkout with a `.venv` of its own; the two take turns. Phases come from the run's own lines on standard error
and from the times in its MLflow database. CPU seconds are those of all processes of the run, Ray's included: where
others use the machine too, they say more than the clock.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from tests.benchmarks.results import write_section

ROOT = Path(__file__).parents[2]
STAGE = "warmup"
TARGETS = {"first step": 2 / 3, "whole run": 3 / 4}
SAMPLE_SECONDS = 0.2


class CpuMeter(threading.Thread):
    """Adds up the CPU seconds of a process and of all that it started, by looking at them often."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.root, self.used, self.over = psutil.Process(pid), dict[int, float](), threading.Event()

    def run(self) -> None:
        """What the thread does."""
        while not self.over.wait(SAMPLE_SECONDS):
            try:
                family = [self.root, *self.root.children(recursive=True)]
            except psutil.Error:
                continue
            for process in family:
                try:
                    times = process.cpu_times()
                except psutil.Error:
                    continue
                self.used[process.pid] = times.user + times.system

    def stop(self) -> float:
        """Seconds in all."""
        self.over.set()
        self.join()
        return sum(self.used.values())


def tessera(checkout: Path, folder: Path, *arguments: str) -> tuple[dict[str, float], dict[str, object], float]:
    """Run the quickstart; seconds since the command by the lines that its stages print, its result, CPU seconds."""
    python = Path(sys.executable) if checkout == ROOT else checkout / ".venv/bin/python"
    command = [python, "-m", "pipeline.cli", "run", "configs/quickstart.yaml", "--json", "--store", folder / "store"]
    command += ["--set", f"tracking=sqlite:///{folder / 'mlflow.db'}", *arguments]
    started = time.time()
    with subprocess.Popen(command, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        meter = CpuMeter(process.pid)
        meter.start()
        assert process.stdout is not None
        assert process.stderr is not None
        lines = [(time.time() - started, line.strip()) for line in process.stderr]
        out = process.stdout.read()
    cpu = meter.stop()
    if process.returncode:
        raise RuntimeError("\n".join(line for _, line in lines[-30:]))
    seen = {"end": time.time() - started, "command": started}
    for at, line in lines:
        if line.startswith(f"{STAGE}: done"):
            seen["done"] = at
        elif line.startswith(f"{STAGE}:"):
            seen.setdefault("begins", at)
    return seen, json.loads(out), cpu


def one_stage(checkout: Path) -> dict[str, float]:
    """Phases of the stage `warmup` in seconds; its images are there already."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tessera(checkout, folder, "--only", "images")
        seen, _, cpu = tessera(checkout, folder, "--only", STAGE, "--set", f"stages.{STAGE}.log_every=1")
        with sqlite3.connect(folder / "mlflow.db") as database:
            runs = database.execute("select run_uuid, start_time from runs where name = ?", [STAGE]).fetchall()
            steps = "select step, timestamp from metrics where run_uuid = ? and key = 'total' order by step"
            rows = database.execute(steps, [runs[0][0]]).fetchall()
    since = {step: at / 1000 - seen["command"] for step, at in rows if step > 0}
    up, first, last = runs[0][1] / 1000 - seen["command"], min(since.values()), max(since.values())
    return {
        "plan": seen["begins"],
        "Ray and MLflow": up - seen["begins"],
        "first step": first - up,
        "other steps": last - first,
        "artifact": seen["done"] - last,
        "end": seen["end"] - seen["done"],
        "whole run": seen["end"],
        "CPU seconds": cpu,
    }


def whole(checkout: Path) -> dict[str, float]:
    """Seconds of every stage of the quickstart."""
    with tempfile.TemporaryDirectory() as name:
        seen, result, cpu = tessera(checkout, Path(name))
    stages = {stage["name"]: stage["seconds"] for stage in result["stages"]}  # type: ignore[attr-defined]
    return {**stages, "whole run": seen["end"], "CPU seconds": cpu}


def table(rounds: Sequence[Mapping[str, Mapping[str, float]]]) -> str:
    """A line a phase: the median over the rounds, and the median of each round's ratio."""
    names = list(rounds[0])
    lines = [f"| phase | {', s | '.join(names)}, s |" + (" ratio | target |" if len(names) == 2 else "")]
    lines.append("| --- |" + " --- |" * (len(names) + 2 * (len(names) == 2)))
    for phase in rounds[0][names[0]]:
        cells = [f"{statistics.median(done[name][phase] for done in rounds):.1f}" for name in names]
        if len(names) == 2:
            ratio = statistics.median(done[names[0]][phase] / max(done[names[1]][phase], 1e-3) for done in rounds)
            target = f"at most {TARGETS[phase]:.2f}" if phase in TARGETS else ""
            cells += [f"{ratio:.2f}", target]
        lines.append(f"| {phase} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whole", action="store_true", help="all stages of the quickstart")
    parser.add_argument("--against", type=Path, help="another checkout with its own .venv, measured in turns")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="put the figures into RESULTS.md")
    options = parser.parse_args()
    checkouts = {"this": ROOT} | ({"other": options.against.resolve()} if options.against else {})
    rounds = []
    for number in range(options.rounds):
        turn = list(checkouts.items())[:: -1 if number % 2 else 1]
        done = {name: (whole if options.whole else one_stage)(checkout) for name, checkout in turn}
        rounds.append({name: done[name] for name in checkouts})
        print(json.dumps({name: {k: round(v, 1) for k, v in one.items()} for name, one in rounds[-1].items()}))
    body = table(rounds)
    print(body)
    if options.write:
        flags = " --whole" * options.whole + " --against OTHER" * bool(options.against)
        command = f"python -m tests.benchmarks.startup{flags} --rounds {options.rounds} --write"
        about = "Medians. `first step` begins when Ray and MLflow are up; `artifact` is what follows the last step."
        if options.against:
            about += " Ratio: this to the other checkout, the median over the rounds, which take turns."
        title = "Start-up: the whole quickstart" if options.whole else "Start-up: a pre-training stage"
        write_section(title, command, f"{about}\n\n{body}")


if __name__ == "__main__":
    main()
