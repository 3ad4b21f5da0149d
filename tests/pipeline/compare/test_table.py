"""Cells, intervals and verdicts; and the command."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from pipeline.compare import render
from pipeline.compare.table import Cell, Comparison, _judge, _over_seeds
from tests.pipeline.workshop import Workshop


def judged(values: Mapping[str, float], draws: Mapping[str, Any], *, smaller: bool = False) -> dict[str, Cell]:
    cells: dict[str, Cell | None] = {row: Cell(value) for row, value in values.items()}
    _judge(cells, "m", {(row, "m"): np.asarray(drawn) for row, drawn in draws.items()}, smaller)
    return {row: cell for row, cell in cells.items() if cell is not None}


def test_a_difference_is_judged_by_its_own_interval() -> None:
    shared = np.random.default_rng(0).normal(size=1000) * 5  # what the drawn test images have in common
    own = np.random.default_rng(1).normal(size=(2, 1000)) * 0.1
    cells = judged(
        {"a": 50.0, "b": 49.0, "c": 50.01}, {"a": 50 + shared, "b": 49 + shared + own[0], "c": 50.01 + shared + own[1]}
    )
    assert [cells[row].verdict for row in "abc"] == ["same", "worse", "best"]
    assert cells["b"].high is not None
    assert cells["b"].high > 50  # the intervals overlap, and the pair can be told apart all the same


def test_smaller_can_be_better() -> None:
    flat = np.zeros(100)
    cells = judged({"a": 1.0, "b": 2.0}, {"a": flat + 1, "b": flat + 2}, smaller=True)
    assert (cells["a"].verdict, cells["b"].verdict) == ("best", "worse")


def test_without_draws_nothing_is_claimed() -> None:
    cells = judged({"a": 1.0, "b": 2.0}, {})
    assert (cells["a"].verdict, cells["b"].verdict, cells["a"].low) == ("", "best", None)


def test_one_encoder_alone_is_no_best() -> None:
    assert judged({"a": 1.0}, {"a": np.ones(10)})["a"].verdict == ""


def test_seeds_are_drawn_again_too() -> None:
    drawn = _over_seeds([np.zeros(4000), np.ones(4000)], seed=0)
    assert drawn.mean() == pytest.approx(0.5, abs=0.03)
    assert sorted(set(drawn.tolist())) == [0.0, 0.5, 1.0]


PIPELINE = """
store: store
tracking: {tracking}
for_each:
  seed: [0, 1]
  scale: [1, 2]
stages:
  few: {{uses: fake_numbers, source: numbers.txt}}
  many: {{uses: fake_numbers, source: more.txt}}
  "small_{{seed}}": {{uses: fake_encoder, numbers: few, seed: "{{seed}}"}}
  large: {{uses: fake_encoder, numbers: many}}
  "times{{scale}}_small_{{seed}}": {{uses: fake_score, of: "small_{{seed}}", scale: "{{scale}}"}}
  "times{{scale}}_large": {{uses: fake_score, of: large, scale: "{{scale}}"}}
"""


@pytest.fixture
def compared(workshop: Workshop) -> Workshop:
    (workshop.folder / "more.txt").write_text("".join(f"{i}\n" for i in range(60)))
    workshop.write(PIPELINE)
    return workshop


def test_the_command_runs_what_is_missing_and_shows_the_table(compared: Workshop) -> None:
    shown = compared.json("compare", "p.yaml")
    ran = len(compared.ran)
    rows = {row["encoder"]: row["cells"] for row in shown["rows"]}
    assert list(rows) == ["small", "large"]
    assert [column["name"] for column in shown["columns"]] == ["times1", "times2"]
    cell = rows["small"]["times2"]["bytes"]
    assert (cell["value"], cell["spread"], cell["verdict"], len(cell["artifacts"])) == (6.0, 0.0, "worse", 2)
    assert cell["low"] < 6 < cell["high"]
    assert rows["large"]["times1"]["bytes"]["verdict"] == "best"
    again = compared.tessera("compare", "p.yaml", "--markdown", "t.md", "--csv", "t.csv")
    assert len(compared.ran) == ran
    assert "120.0** [" in again.stdout
    assert "small (2 seeds)" in again.stdout
    assert (compared.folder / "t.md").read_text().startswith("| encoder | times1: bytes | times2: bytes |")
    lines = list(csv.DictReader(io.StringIO((compared.folder / "t.csv").read_text())))
    assert {(line["encoder"], line["protocol"], line["seeds"]) for line in lines} == {
        ("small", "times1", "2"),
        ("small", "times2", "2"),
        ("large", "times1", "1"),
        ("large", "times2", "1"),
    }


def test_another_encoder_computes_its_row_only(compared: Workshop) -> None:
    compared.tessera("compare", "p.yaml")
    before = len(compared.ran)
    extra = """\
  other: {{uses: fake_encoder, numbers: few, width: 9}}
  "times{{scale}}_other": {{uses: fake_score, of: other, scale: "{{scale}}"}}
"""
    compared.write(PIPELINE + extra)
    compared.tessera("compare", "p.yaml")
    assert compared.ran[before:] == ["other", "times1_other", "times2_other"]


def test_what_no_evaluation_needs_is_not_computed(compared: Workshop) -> None:
    compared.write(PIPELINE + "  apart: {{uses: fake_encoder, numbers: few, width: 11}}\n")
    compared.tessera("compare", "p.yaml")
    assert "apart" not in compared.ran


def test_a_failed_cell_leaves_the_others(compared: Workshop) -> None:
    extra = """\
  broken: {{uses: fake_scaled, numbers: few, fail: purpose}}
  odd: {{uses: fake_encoder, numbers: broken, width: 4}}
  times1_odd: {{uses: fake_score, of: odd}}
"""
    compared.write(PIPELINE + extra)
    shown = compared.tessera("compare", "p.yaml", "--keep-going", code=1)
    assert "60.0** [" in shown.stdout
    assert "the numbers are too odd" in shown.stderr


def test_an_empty_cell_is_an_empty_text() -> None:
    table = Comparison("p", [], [], {}, {}, {})
    assert render.lines(table) == (["encoder"], [])
    assert render.cell_text(None) == ""
    assert render.cell_text(Cell(0.51234, 0.5, 0.53, 0.01, "same")) == "0.512≈ [0.500, 0.530] ±0.010"
