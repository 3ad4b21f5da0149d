"""What is wrong with a space is said before anything runs: the place, the rule, the remedy; one line each."""

from __future__ import annotations

from typing import Any

import pytest

from tests.pipeline.sweep.conftest import NEAR, SPACE, Sweeps

RANGE = {"uniform": [0, 6]}


def _with(**changes: Any) -> dict[str, Any]:
    return {**SPACE, **changes}


@pytest.mark.parametrize(
    ("space", "place", "rule"),
    [
        # the file itself
        (_with(objectiv="judge.score"), "objectiv", "unknown key 'objectiv' (did you mean 'objective'?)"),
        ({"space": {NEAR: RANGE}, "trials": 3}, "objective", "'objective' is missing"),
        (_with(trials=None), "trials", "say how many settings are to be tried"),
        (_with(space={NEAR: {}}), f"space.{NEAR}", "give one of uniform, loguniform, choice, grid, got none"),
        (_with(space={NEAR: {"uniform": [0, 1], "choice": [1]}}), f"space.{NEAR}", "got uniform and choice"),
        (_with(space={NEAR: {"uniform": [6, 0]}}), f"space.{NEAR}.uniform", "[6, 0] is no range"),
        (_with(space={NEAR: {"loguniform": [0, 1]}}), f"space.{NEAR}.loguniform", "0 has no logarithm"),
        (_with(search="grid"), "search", f"grid needs lists, and {NEAR} has a range"),
        (_with(search="optuna", space={NEAR: {"grid": [1, 2]}}), "search", "write choice in place of grid"),
        (_with(search="bayes"), "search", "must be 'random', 'grid' or 'optuna'"),
        (_with(scheduler="asha"), "scheduler", "asha compares trials before their end; give rungs"),
        (_with(rungs=[30, 10]), "rungs", "give steps that rise"),
        (_with(seeds=[1, 1]), "seeds", "give different seeds"),
        # beside the pipeline
        (_with(space={"stages.trainin.seed": RANGE}), "space.stages.trainin.seed", "no stage is called 'trainin'"),
        (_with(space={"stages.training.wieghts.near": RANGE}), "wieghts", "unknown key 'wieghts' (did you mean 'wei"),
        (_with(space={NEAR: {"uniform": [-1, 6]}}), f"space.{NEAR}", "a weight is 0 or more"),
        (_with(space={"stages.training.steps": {"choice": [9, "x"]}}), "steps", "must be a whole number, got 'x'"),
        (_with(space={"store": {"choice": ["a", "b"]}}), "space.store", "only settings of stages are swept"),
        (_with(space={"stages.training.seconds": RANGE}), "seconds", "it changes no result"),
        (_with(space={"stages.side.of": {"choice": ["training"]}}), "side", "judge.score does not depend on it"),
        (_with(space={"stages.training.steps": {"choice": [90]}}), "steps", "make no difference to the pipeline"),
        (_with(objective="juge.score"), "objective", "p.yaml has no stage 'juge' (did you mean 'judge'?)"),
        (_with(objective="judge.scor"), "objective", "'judge' reports no metric 'scor' (did you mean 'score'?)"),
        (_with(objective="training.total"), "objective", "its weighted total, changes with the swept weights"),
        (_with(objective="training.total"), "objective", "name one of judge.score, judge.error, side.score"),
        (_with(rungs=[10], space={"stages.judge.resources.cpus": RANGE}), "space.", "it changes no result"),
        (_with(rungs={"stage": "scaled", "steps": [10]}), "rungs.stage", "'scaled' is no training that the trials cha"),
        (_with(seeds={"values": [0], "paths": ["stages.training.sed"]}), "seeds", "unknown key 'sed'"),
        (_with(seeds=[0], space={"stages.training.seed": RANGE}), "space.stages.training.seed", "a whole number"),
        (_with(seeds=[0], space={"stages.training.seed": {"choice": [1, 2]}}), "seeds", "training.seed is swept too"),
    ],
)
def test_bad_input_is_one_line_with_its_place(sweeps: Sweeps, space: dict[str, Any], place: str, rule: str) -> None:
    said = sweeps.said(space, code=2)
    lines = [line for line in said.strip().split("\n") if rule in line]
    assert lines, f"{rule!r} is not in:\n{said}"
    assert lines[0].removeprefix("error: ").startswith("s.yaml")
    assert place in lines[0]
    assert "Traceback" not in said
    assert not sweeps.workshop.ran


def test_all_problems_are_said_at_once(sweeps: Sweeps) -> None:
    paths = {"stages.training.wieghts": {"choice": [1]}, "stages.scaled.facto": {"choice": [1]}}
    said = sweeps.said({**SPACE, "space": paths}, code=2)
    assert len(said.strip().split("\n")) == 2


def test_the_line_of_a_value_is_named(sweeps: Sweeps) -> None:
    lines = ["objective: judge.score", "trials: 2", "space:", f"  {NEAR}: {{uniform: [0, 1]}}"]
    lines.append("  stages.scaled.facto: {choice: [1]}")
    (sweeps.workshop.folder / "s.yaml").write_text("\n".join(lines))
    shown = sweeps.workshop.tessera("sweep", "p.yaml", "--space", "s.yaml", code=2)
    assert shown.stderr.startswith("error: s.yaml:5: space.stages.scaled.facto: unknown key 'facto'")


def test_a_missing_file_is_said_with_the_one_that_was_probably_meant(sweeps: Sweeps) -> None:
    sweeps.write(SPACE, "space.yaml")
    shown = sweeps.workshop.tessera("sweep", "p.yaml", "--space", "spac.yaml", code=2)
    assert "there is no such space file (did you mean 'space.yaml'?)" in shown.stderr


def test_a_missing_source_is_the_pipelines_own_error(sweeps: Sweeps) -> None:
    (sweeps.workshop.folder / "numbers.txt").unlink()
    assert "p.yaml:5: stages.numbers.source" in sweeps.said(SPACE, code=2)


def test_dry_run_counts_stage_runs(sweeps: Sweeps) -> None:
    space = {**SPACE, "rungs": [10, 30], "seeds": [0, 1]}
    found = sweeps.run(space, "--dry-run")
    trained = 3 * 2 * 3  # trials, seeds, rungs
    assert (found["needed"], found["shared"], found["cached"]) == (2 + 2 * trained, 2, 0)
    assert found["separate"] == 3 * 2 * 4
    sweeps.workshop.tessera("run", "p.yaml")
    found = sweeps.run(space, "--dry-run")
    assert (found["needed"], found["cached"]) == (2 + 2 * trained, 2)
    assert found["seconds"] > 0
    assert not found["unknown"]


def test_what_a_user_sets_is_part_of_the_sweep(sweeps: Sweeps) -> None:
    sweeps.workshop.tessera("run", "p.yaml", "--set", f"{NEAR}=2.5")
    space = {**SPACE, "space": {NEAR: {"grid": [2.5, 3]}}, "search": "grid"}
    found = sweeps.run(space, "--dry-run", "--set", "stages.training.weights={far: 1}")
    assert found["cached"] == 2
    assert sweeps.run(space, "--dry-run")["cached"] == 4
