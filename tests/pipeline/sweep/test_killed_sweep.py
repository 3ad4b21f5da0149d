"""A sweep whose driver, and one of whose trials' processes, is killed with -9: the same command continues it."""

from __future__ import annotations

import json
import os
import signal
import time

import psutil
import pytest

from tests.pipeline.sweep.conftest import NEAR, Sweeps

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

SPACE = {
    "objective": "judge.score",
    "space": {NEAR: {"uniform": [0, 6]}},
    "search": "optuna",
    "trials": 5,
    "rungs": [30, 60],
    "concurrent": 1,
}
SLOW = ("--set", "stages.training.seconds=1.5")


def until(sweeps: Sweeps, trainings: int) -> None:
    end = time.monotonic() + 240
    while sum(line.startswith("training") for line in sweeps.ran()) < trainings:
        assert time.monotonic() < end, sweeps.ran()
        time.sleep(0.05)


def undisturbed(sweeps: Sweeps) -> dict[int, tuple[float, float]]:
    found = json.loads(
        sweeps.workshop.outside("sweep", "p.yaml", "--space", "s.yaml", "--json", "--store", "other").stdout
    )
    return {trial["trial"]: (trial["values"][NEAR], trial["objective"]) for trial in found["trials"]}


def test_a_killed_sweep_continues_with_what_was_finished(sweeps: Sweeps) -> None:
    sweeps.write(SPACE)
    command = ("sweep", "p.yaml", "--space", "s.yaml", "--json", *SLOW)
    first = sweeps.workshop.start(*command, group=True)
    until(sweeps, 7)  # two trials are finished, the third has begun
    below = psutil.Process(first.pid).children(recursive=True)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    psutil.wait_procs(below, timeout=60)
    before = sweeps.ran()

    second = sweeps.workshop.start(*command)
    until(sweeps, 10)
    pid = sweeps.workshop.ran[-1].split("pid=")[-1]
    if pid.isdigit():
        os.kill(int(pid), signal.SIGKILL)  # a trial's process: the trial begins again, from its last rung
    output, errors = second.communicate(timeout=300)
    assert second.returncode == 0, errors
    found = json.loads(output)
    assert found["kept"] == [0, 1]
    assert {trial["state"] for trial in found["trials"]} == {"finished"}
    after = sweeps.ran()[len(before) :]
    finished = {line for line in before if line.startswith("training") and line != before[-1]}
    assert not finished & set(after), "what was finished ran again"
    assert before.count("numbers") + after.count("numbers") == 1
    values = {trial["trial"]: (trial["values"][NEAR], trial["objective"]) for trial in found["trials"]}
    assert values == undisturbed(sweeps)
