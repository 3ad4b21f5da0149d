"""Which evaluations stand side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.compare.grouping import Column, Row, group
from pipeline.config.load import load_pipeline
from pipeline.errors import UsageError
from pipeline.plan.plan import make_plan
from pipeline.store.store import ArtifactStore
from tests.pipeline.workshop import Workshop

HEAD = """
store: store
tracking: {tracking}
stages:
  numbers: {{uses: fake_numbers, source: numbers.txt}}
"""


def grouped(workshop: Workshop, text: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Row], list[Column]]:
    workshop.write(HEAD + text)
    monkeypatch.chdir(workshop.folder)
    pipeline = load_pipeline(Path("p.yaml"))
    return group(pipeline, make_plan(pipeline, ArtifactStore(pipeline.store)))


def test_encoders_are_rows_and_equal_evaluations_columns(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
  small: {{uses: fake_encoder, numbers: numbers, width: 2}}
  large: {{uses: fake_encoder, numbers: numbers, width: 9}}
  size_small: {{uses: fake_score, of: small}}
  size_large: {{uses: fake_score, of: large}}
  large-double: {{uses: fake_score, of: large, scale: 2}}
"""
    rows, columns = grouped(workshop, text, monkeypatch)
    assert [(row.name, row.encoders) for row in rows] == [("small", ["small"]), ("large", ["large"])]
    assert [(column.name, column.uses) for column in columns] == [("size", "fake_score"), ("double", "fake_score")]
    assert columns[0].cells == {"small": ["size_small"], "large": ["size_large"]}
    assert columns[1].cells == {"large": ["large-double"]}


def test_encoders_that_differ_in_seeds_only_share_a_row(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
  first: {{uses: fake_encoder, numbers: numbers, seed: 0}}
  second: {{uses: fake_encoder, numbers: numbers, seed: 1}}
  net_0: {{uses: fake_encoder, numbers: numbers, width: 5, init: first}}
  net_1: {{uses: fake_encoder, numbers: numbers, width: 5, init: second}}
  a: {{uses: fake_score, of: net_0}}
  b: {{uses: fake_score, of: net_1}}
"""
    rows, columns = grouped(workshop, text, monkeypatch)
    assert [(row.name, row.encoders) for row in rows] == [("net", ["net_0", "net_1"])]
    assert [column.cells for column in columns] == [{"net": ["a", "b"]}]


def test_the_encoder_may_stand_behind_other_stages(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
  net: {{uses: fake_encoder, numbers: numbers}}
  behind: {{uses: fake_scaled, numbers: numbers}}
  of_numbers: {{uses: fake_score, of: behind}}
  score: {{uses: fake_score, of: net}}
"""
    rows, columns = grouped(workshop, text, monkeypatch)
    assert [row.name for row in rows] == ["net"]  # what evaluates no encoder has no place
    assert [column.name for column in columns] == ["score"]


def test_two_protocols_of_one_name_are_told_apart(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
  x: {{uses: fake_encoder, numbers: numbers}}
  y: {{uses: fake_encoder, numbers: numbers, width: 8}}
  score_x: {{uses: fake_score, of: x}}
  score_y: {{uses: fake_score, of: y, scale: 3}}
"""
    _, columns = grouped(workshop, text, monkeypatch)
    assert [column.name for column in columns] == ["score", "score (2)"]


def test_a_pipeline_without_evaluations_is_refused(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no stage that evaluates an encoder"):
        grouped(workshop, "  net: {{uses: fake_encoder, numbers: numbers}}\n", monkeypatch)
