"""Stages that are written once and stand in the pipeline once for each value of a variable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config.load import Pipeline
from pipeline.errors import ConfigError

Load = Callable[..., Pipeline]

TEXT = """\
for_each:
  size: [8, 16]
  of: [day, night]
stages:
  day: {uses: ingest, source: a}
  night: {uses: ingest, source: b}
  slic_{of}_{size}: {uses: superpixels, images: "{of}", region_size: "{size}"}
"""


def test_a_stage_for_every_combination_with_values_of_their_type(load: Load) -> None:
    pipeline = load(TEXT)
    assert list(pipeline.stages) == ["day", "night", "slic_day_8", "slic_day_16", "slic_night_8", "slic_night_16"]
    one = pipeline.stages["slic_night_16"]
    assert one.inputs == {"images": "night"}
    assert one.stage.config.region_size == 16
    assert "for_each" not in pipeline.plain()
    assert pipeline.problem("stages.slic_night_16.region_size", "too large").line == 7


def test_a_stage_with_the_name_of_a_copy_changes_it(load: Load) -> None:
    pipeline = load(TEXT + "  slic_day_8: {region_size: 9}\n")
    assert pipeline.stages["slic_day_8"].stage.config.region_size == 9
    assert pipeline.stages["slic_day_8"].inputs == {"images": "day"}


def test_set_reaches_variables_the_written_stage_and_one_copy(load: Load) -> None:
    assert "slic_day_32" in load(TEXT, "for_each.size=[32]").stages
    every = load(TEXT, "stages.slic_{of}_{size}.region_size=5").stages
    assert {stage.stage.config.region_size for name, stage in every.items() if "slic" in name} == {5}
    one = load(TEXT, "stages.slic_day_8.region_size=5").stages
    assert [one[name].stage.config.region_size for name in ("slic_day_8", "slic_night_8")] == [5, 8]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("for_each:", "for_eech:", "for_eech"),
        ("slic_{of}_{size}", "slic_{off}_{size}", "for_each has no such variable (did you mean 'of'?)"),
        ('"{size}"', '"{size}{off}"', "region_size"),
        ("slic_{of}_{size}", "slic_{of}", "holds {size}, which the stage's name does not (put {size} into the stage's"),
        ('"{of}"', "{of}", '{of} is a mapping in YAML (write it in quotes: "{of}")'),
        ("[8, 16]", "[]", "for_each.size: must be a list of words or numbers, with at least one"),
        ("[8, 16]", "[[8]]", "for_each.size: must be a list of words or numbers, with at least one"),
        ("[8, 16]", "[8, 8]", "for_each.size: lists a value twice"),
        ("size: [8, 16]", "Size: [8]", "'Size' is no name of a variable"),
    ],
)
def test_rules_are_said_with_their_line(load: Load, old: str, new: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(TEXT.replace(old, new))
    assert said in str(caught.value)
    assert str(Path("p.yaml")) in str(caught.value)


def test_without_variables_nothing_changes(load: Load) -> None:
    assert list(load("stages: {day: {uses: ingest, source: 'a{b}'}}").stages) == ["day"]
