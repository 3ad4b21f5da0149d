"""Sweeps on a real Ray Tune, over a pipeline that trains in no time: what is computed, kept, stopped and written."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from pipeline.store.store import ArtifactStore
from tests.pipeline.sweep.conftest import NEAR, PIPELINE, SPACE, Sweeps

pytestmark = [pytest.mark.ray, pytest.mark.slow]

GRID = {"objective": "judge.score", "search": "grid", "space": {NEAR: {"grid": [1, 2, 3]}}}


def trainings(sweeps: Sweeps) -> list[str]:
    return [line for line in sweeps.ran() if line.startswith("training")]


def test_upstream_runs_once_a_repetition_costs_nothing_and_the_best_is_cached(on_ray: Callable[[], Sweeps]) -> None:
    sweeps = on_ray()
    sweeps.workshop.write(PIPELINE, tracking="sqlite:///runs.db")
    found = sweeps.run({**GRID, "seeds": [0, 5]}, "--to", "out")
    assert [trial["values"][NEAR] for trial in found["trials"]] == [3, 2, 1]
    assert found["trials"][0]["objective"] == pytest.approx(10.025)
    assert found["trials"][0]["spread"] == pytest.approx(0.05 / 2**0.5)
    assert found["trials"][1]["close_to_best"] is False
    ran = sweeps.ran()
    assert [ran.count(name) for name in ("numbers", "scaled", "judge", "side")] == [1, 1, 6, 0]
    assert len(trainings(sweeps)) == len(set(trainings(sweeps))) == 6
    plan = sweeps.workshop.states("plan", "out/best.yaml")
    assert set(plan) == {"numbers", "scaled", "training", "judge"}
    assert set(plan.values()) == {"cached"}
    out = sweeps.workshop.folder / "out"
    assert yaml.safe_load((out / "best.yaml").read_text())["stages"]["training"]["weights"] == {"near": 3}
    rows = list(csv.DictReader(io.StringIO((out / "leaderboard.csv").read_text())))
    assert [(row["rank"], row[NEAR], row["state"]) for row in rows] == [
        (str(i), str(4 - i), "finished") for i in (1, 2, 3)
    ]
    assert (out / "parallel_coordinates.png").read_bytes().startswith(b"\x89PNG")
    # the same command again
    again = sweeps.run({**GRID, "seeds": [0, 5]}, "--to", "out")
    assert again["kept"] == [0, 1, 2]
    assert again["trials"] == found["trials"]
    assert sweeps.ran() == ran
    _check_tracking(found["name"])


def _check_tracking(name: str) -> None:
    import mlflow

    client = mlflow.MlflowClient("sqlite:///runs.db")
    experiment = client.get_experiment_by_name("p")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if run.info.run_name == name]
    assert len(parents) == 2  # one a command
    for parent in parents:
        children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
        assert {run.data.params[NEAR] for run in children} == {"1", "2", "3"}
        assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
        assert parent.data.metrics["best"] == pytest.approx(10.025)
        files = {file.path for file in client.list_artifacts(parent.info.run_id)}
        assert files >= {"best.yaml", "leaderboard.csv", "parallel_coordinates.png"}


def test_rungs_end_in_what_a_plain_run_makes_and_asha_stops_the_worse(on_ray: Callable[[], Sweeps]) -> None:
    sweeps = on_ray()
    lists = {"stages.training.weights.near": {"grid": [3, 0, 0.5, 5.5]}}
    space = {**GRID, "space": lists, "scheduler": "asha", "rungs": [10, 30], "concurrent": 1}
    found = sweeps.run(space)
    assert [(trial["trial"], trial["state"], trial["steps"]) for trial in found["trials"]] == [
        (0, "finished", "all"),
        (2, "stopped", "10"),
        (3, "stopped", "10"),
        (1, "stopped", "10"),
    ]
    assert trainings(sweeps)[:4] == [
        "training near=3 seed=0 to=10",
        "training near=3 seed=0 to=30",
        "training near=3 seed=0 to=90",
        "training near=0 seed=0 to=10",
    ]
    states = sweeps.workshop.states("plan", "p.yaml", "--set", f"{NEAR}=3")
    assert states["judge"] == states["training"] == "cached"
    # another sweep of the same values: rungs that are in the store count for the scheduler, and cost nothing
    before = trainings(sweeps)
    more = sweeps.run({**space, "space": {"stages.training.weights.near": {"grid": [3, 0, 0.5, 5.5, 0.1]}}})
    assert [trial["state"] for trial in more["trials"]] == ["finished", *["stopped"] * 4]
    assert trainings(sweeps) == [*before, "training near=0.1 seed=0 to=10"]


def test_a_trial_that_is_in_the_store_costs_nothing(on_ray: Callable[[], Sweeps]) -> None:
    sweeps = on_ray()
    sweeps.workshop.tessera("run", "p.yaml", "--set", f"{NEAR}=2")
    before = sweeps.ran()
    found = sweeps.run({**GRID, "space": {NEAR: {"grid": [2]}}, "rungs": [10]})
    assert [(trial["state"], trial["steps"]) for trial in found["trials"]] == [("finished", "all")]
    assert sweeps.ran() == before


@pytest.mark.chaos  # for its length
def test_more_trials_continue_a_sweep_and_another_space_is_told_apart(on_ray: Callable[[], Sweeps]) -> None:
    sweeps = on_ray()
    first = sweeps.run({**SPACE, "trials": 2})
    more = sweeps.run({**SPACE, "trials": 3})
    assert more["sweep"] == first["sweep"]
    assert more["kept"] == [0, 1]
    assert len(trainings(sweeps)) == 3
    drawn = {trial["trial"]: trial["values"] for trial in more["trials"]}
    assert all(drawn[trial["trial"]] == trial["values"] for trial in first["trials"])
    said = sweeps.said({**SPACE, "seed": 7, "trials": 1})
    assert "another sweep than the last one of p (seed): its trials begin anew" in said
    said = sweeps.said({**SPACE, "seed": 7, "trials": 1}, "--set", "stages.scaled.factor=5")
    assert "another sweep than the last one of p: the pipeline has changed" in said


@pytest.mark.chaos  # for its length
def test_a_trial_that_fails_is_kept_and_named_and_the_others_go_on(on_ray: Callable[[], Sweeps]) -> None:
    sweeps = on_ray()
    fails = ("--set", "stages.training.fail_above=2")
    found = sweeps.run(GRID, *fails)
    assert [(trial["values"][NEAR], trial["state"]) for trial in found["trials"]] == [
        (2, "finished"),
        (1, "finished"),
        (3, "failed"),
    ]
    assert "3 is too much (take less)" in found["trials"][2]["error"]
    said = sweeps.said(GRID, *fails)  # it is tried again, and it alone
    assert "2 of 3 trials were finished before: kept" in said
    assert "trial 2: failed: stage 'training' failed: " in said
    assert len(trainings(sweeps)) == 4


def test_when_all_fail_the_sweep_stops(on_ray: Callable[[], Sweeps]) -> None:
    sweeps = on_ray()
    space: dict[str, Any] = {**SPACE, "trials": 20, "concurrent": 1}
    said = sweeps.said(space, "--set", "stages.training.fail_above=-1", code=1)
    assert said.strip().split("\n")[-1].startswith("error: 3 of 20 trials failed, and none came to a result: stage 'tr")
    assert len(trainings(sweeps)) == 3


def test_what_shared_artifacts_show_is_said_before_the_first_trial(on_ray: Callable[[], Sweeps]) -> None:
    sweeps = on_ray()
    space = {**GRID, "space": {"stages.training.weights.numbers": {"grid": [1, 9]}}}
    said = sweeps.said(space, code=2)
    assert "s.yaml:1: space.stages.training.weights.numbers: " in said
    assert "there are only 3 numbers (lower it)" in said
    assert sweeps.ran() == ["numbers", "scaled"]


@pytest.mark.chaos  # for its length
def test_median_stops_what_is_below_the_middle(on_ray: Callable[[], Sweeps]) -> None:
    sweeps = on_ray()
    space = {**GRID, "space": {NEAR: {"grid": [3, 2.5, 2, 0]}}, "scheduler": "median", "rungs": [10], "concurrent": 1}
    found = sweeps.run(space)
    assert [trial["state"] for trial in found["trials"]] == ["finished"] * 3 + ["stopped"]


def test_processes_stay_from_trial_to_trial(on_ray: Callable[[], Sweeps]) -> None:
    sweeps = on_ray()
    sweeps.run({**SPACE, "trials": 6, "concurrent": 1})
    assert len({line.split("pid=")[1] for line in sweeps.workshop.ran if "pid=" in line}) == 1


@pytest.mark.chaos  # for its length
def test_trials_leave_the_history_of_the_pipeline_alone(on_ray: Callable[[], Sweeps]) -> None:
    sweeps = on_ray()
    sweeps.workshop.tessera("run", "p.yaml")
    found = sweeps.run(SPACE)
    plan = sweeps.workshop.json("plan", "p.yaml", "--set", f"{NEAR}=1.25")
    reasons = {stage["name"]: stage["reasons"] for stage in plan["stages"]}
    assert reasons["training"] == [f"{NEAR} unset -> 1.25"]
    artifact = next(a for a in ArtifactStore("store").artifacts() if a.manifest.config.get("weights"))
    assert artifact.manifest.made_by["pipeline"] == found["name"]
