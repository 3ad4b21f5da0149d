"""Which settings are tried: the same ones for the same seed, also by a sweep that continues."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.sweep.draw import draw
from pipeline.sweep.record import Rung, Trial
from pipeline.sweep.space import Space

A, B = "stages.x.a", "stages.x.b"


def space(**changes: Any) -> Space:
    plain = {"objective": "j.m", "space": {A: {"loguniform": [0.01, 100]}}, "trials": 20, **changes}
    return Space.model_validate(plain)


def peak_at_one(values: dict[str, Any]) -> float:
    return -abs(values[A] - 1)


def sweep(of: Space, until: int, known: list[Trial]) -> list[Trial]:
    for number in range(len(known), until):
        values = draw(of, "max", number, known)
        known = [*known, Trial(number, values, "finished", [Rung(0, None, [peak_at_one(values)])])]
    return known


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_a_sweep_that_continues_draws_what_it_would_have_drawn(search: str) -> None:
    of = space(search=search)
    whole = [trial.values for trial in sweep(of, 16, [])]
    continued = [trial.values for trial in sweep(of, 16, sweep(of, 7, []))]
    assert continued == whole
    assert len({values[A] for values in whole}) == 16
    assert [trial.values for trial in sweep(space(search=search, seed=1), 16, [])] != whole


def test_draws_keep_to_their_bounds_and_are_even_on_a_logarithm() -> None:
    of = space()
    drawn = [draw(of, "max", number)[A] for number in range(200)]
    assert all(0.01 <= value <= 100 for value in drawn)
    assert 70 < sum(value < 1 for value in drawn) < 130


def test_optuna_learns_from_what_is_known() -> None:
    drawn = [trial.values[A] for trial in sweep(space(search="optuna"), 40, [])]
    near = [sum(0.3 < value < 3 for value in part) for part in (drawn[:10], drawn[30:])]
    assert near[1] > near[0]


def test_stopped_and_failed_trials_do_not_disturb_optuna() -> None:
    known = [
        Trial(0, {A: 1.0}, "stopped", [Rung(0, 10, [0.5])]),
        Trial(1, {A: 2.0}, "failed", error="no"),
        Trial(2, {A: 3.0}, "running"),
        *(Trial(number, {A: 4.0}, "finished", [Rung(0, None, [1.0])]) for number in range(3, 15)),
    ]
    assert 0.01 <= draw(space(search="optuna"), "max", 15, known)[A] <= 100


def test_grid_goes_through_every_combination() -> None:
    lists = {A: {"grid": [1, 2, 3]}, B: {"choice": ["x", {"deep": [1]}]}}
    of = Space.model_validate({"objective": "j.m", "space": lists, "search": "grid"})
    assert of.settings_to_try == 6
    tried = [draw(of, "max", number) for number in range(6)]
    assert sorted(map(str, tried)) == sorted(str({A: a, B: b}) for a in (1, 2, 3) for b in ("x", {"deep": [1]}))


def test_random_goes_through_grids_evenly_and_draws_the_rest() -> None:
    of = space(space={A: {"uniform": [0, 1]}, B: {"grid": ["x", "y"]}, "stages.x.c": {"choice": [[1], [2]]}}, trials=8)
    tried = [draw(of, "max", number) for number in range(8)]
    assert [values[B] for values in tried] == ["x", "y"] * 4
    assert len({values[A] for values in tried}) == 8
    assert all(values["stages.x.c"] in ([1], [2]) for values in tried)
