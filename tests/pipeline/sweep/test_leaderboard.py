"""The order of trials, what is too close to the best to be told from it, the plots, and how a cluster is divided."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest

from pipeline.config.load import load_pipeline
from pipeline.errors import ConfigError
from pipeline.run.capacity import Machine
from pipeline.store.store import ArtifactStore
from pipeline.sweep import leaderboard
from pipeline.sweep.design import make_design
from pipeline.sweep.ledger import Ledger
from pipeline.sweep.plots import pictures
from pipeline.sweep.record import Records, Rung, Trial
from pipeline.sweep.slots import Slots, make_slots
from pipeline.sweep.space import SpaceFile
from tests.pipeline.sweep.conftest import NEAR, SPACE, Sweeps


def make_ledger(sweeps: Sweeps, known: list[Trial], **changes: Any) -> Ledger:
    space = SpaceFile(sweeps.write({**SPACE, "trials": 8, "rungs": [10], "seeds": [0, 1], **changes}))
    records = Records(ArtifactStore("store"), "0" * 12, "p")
    for trial in known:
        records.keep(trial)
    return Ledger(make_design(load_pipeline("p.yaml"), space), records, lambda trial: None)


def ended(number: int, *by_seed: float) -> Trial:
    rungs = [Rung(0, 10, [0.1, 0.1]), Rung(1, None, list(by_seed), 2.0)]
    return Trial(number, {NEAR: float(number)}, "finished", rungs)


def stopped(number: int, value: float) -> Trial:
    return Trial(number, {NEAR: float(number)}, "stopped", [Rung(0, 10, [value, value])])


def test_finished_trials_come_first_and_noise_is_not_taken_for_a_winner(sweeps: Sweeps) -> None:
    trials = [ended(0, 5.0, 7.0), ended(1, 6.4, 6.6), ended(2, 1.0, 1.2), stopped(3, 9.0), stopped(4, 9.5)]
    ledger = make_ledger(sweeps, trials)
    rows = leaderboard.rows(ledger)
    assert [(row["trial"], row["rank"], row["close_to_best"]) for row in rows] == [
        (1, 1, None),
        (0, 2, True),
        (2, 3, False),
        (4, None, None),
        (3, None, None),
    ]
    assert leaderboard.remark(ledger).startswith("1 trial differs from the best by less than 2 standard errors")
    written = list(csv.DictReader(io.StringIO(leaderboard.csv_text(ledger))))
    assert [float(row[NEAR]) for row in written] == [1, 0, 2, 4, 3]
    assert [row["steps"] for row in written] == ["all", "all", "all", "10", "10"]
    lower = make_ledger(sweeps, trials, mode="min").best()
    assert lower is not None
    assert lower.number == 2


def test_one_seed_cannot_tell_noise(sweeps: Sweeps) -> None:
    ledger = make_ledger(sweeps, [ended(0, 5.0), ended(1, 5.1)], seeds=None)
    assert leaderboard.rows(ledger)[1]["close_to_best"] is None
    assert leaderboard.remark(ledger).startswith("one seed a setting")


def test_pictures_need_trials(sweeps: Sweeps) -> None:
    assert pictures(make_ledger(sweeps, [ended(0, 1.0, 2.0)])) == {}
    drawn = pictures(make_ledger(sweeps, [ended(n, n + 1.0, n + 2.0) for n in range(6)]))
    assert set(drawn) == {"parallel_coordinates.png", "importances.png"}
    assert all(picture.startswith(b"\x89PNG") for picture in drawn.values())
    early = pictures(make_ledger(sweeps, [ended(0, 1.0, 2.0), *(stopped(n, n + 1.0) for n in range(1, 6))]))
    assert set(early) == set(drawn), "trials that a scheduler has stopped are compared at their rung"


def test_names_are_as_short_as_they_can_be(sweeps: Sweeps) -> None:
    paths = {
        NEAR: {"uniform": [0, 1]},
        "stages.scaled.factor": {"uniform": [1, 2]},
        "stages.training.seed": {"choice": [1]},
    }
    design = make_ledger(sweeps, [], space=paths, seeds=None, rungs=None).design
    assert list(leaderboard.short_names(design).values()) == ["near", "factor", "seed"]


def test_what_failed_or_was_interrupted_begins_again(sweeps: Sweeps) -> None:
    failed = Trial(1, {NEAR: 1.5}, "failed", error="no")
    at_work = Trial(2, {NEAR: 2.5}, "running", [Rung(0, 10, [1.0, 1.0])])
    ledger = make_ledger(sweeps, [ended(0, 1.0, 1.0), failed, at_work], trials=4)
    assert (ledger.kept, ledger.left, ledger.hopeless) == ([0], 3, False)
    begun = [ledger.next_trial() for _ in range(4)]
    assert [trial and trial.number for trial in begun] == [1, 2, 3, None]
    assert [trial.values[NEAR] for trial in begun[:2] if trial] == [1.5, 2.5]


CPUS = [Machine(4, 0), Machine(2, 0)]


@pytest.mark.parametrize(
    ("resources", "machines", "trials", "wanted", "expected"),
    [
        ({}, CPUS, 20, None, Slots(6, 1, 0)),
        ({}, CPUS, 2, None, Slots(2, 2, 0)),
        ({}, CPUS, 20, 1, Slots(1, 4, 0)),
        ({"cpus": 2}, CPUS, 20, None, Slots(3, 2, 0)),
        ({}, [Machine(16, 4)], 20, None, Slots(4, 4, 1)),
        ({"gpus": 0}, [Machine(2, 4)], 20, None, Slots(2, 1, 0)),
    ],
)
def test_a_cluster_is_divided_among_trials(
    sweeps: Sweeps, resources: dict[str, Any], machines: list[Machine], trials: int, wanted: int | None, expected: Slots
) -> None:
    sets = [
        f"stages.{name}.resources.{key}={value}" for name in ("training", "judge") for key, value in resources.items()
    ]
    pipeline = load_pipeline("p.yaml", sets)
    assert make_slots(pipeline, ["training", "judge"], machines, trials, wanted) == expected


def test_a_stage_on_ray_leaves_room_for_its_workers(sweeps: Sweeps) -> None:
    text = (sweeps.workshop.folder / "p.yaml").read_text().replace("fake_scaled", "fake_on_ray")
    (sweeps.workshop.folder / "p.yaml").write_text(text)
    assert make_slots(load_pipeline("p.yaml"), ["scaled"], CPUS, 9, None) == Slots(1, 0, 0)
    with pytest.raises(ConfigError, match=r"stages\.scaled\.resources: .*set workers: 0, or workers and cpus"):
        make_slots(load_pipeline("p.yaml"), ["scaled"], CPUS, 9, 2)
    sized = load_pipeline("p.yaml", ["stages.scaled.resources={workers: 2, cpus: 1}"])
    assert make_slots(sized, ["scaled"], CPUS, 9, None) == Slots(3, 0, 0)
    with pytest.raises(ConfigError, match="the stage asks for 8 CPUs"):
        make_slots(load_pipeline("p.yaml", ["stages.scaled.resources.cpus=8"]), ["scaled"], CPUS, 9, None)
