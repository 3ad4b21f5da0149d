"""Which evaluations belong side by side: rows are encoders, columns are protocols, found from what the plan knows.

Two evaluations stand in one column when they are the same but for the encoder: the same stage type, settings and
images. Two encoders share a row when they are the same but for their seeds, anywhere above them.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.config.load import Pipeline
from pipeline.errors import UsageError
from pipeline.plan.plan import Plan, PlannedStage

ENCODER = "encoder"  # the kind whose makers are the rows
SEED = "seed"  # the setting in which encoders of one row may differ


@dataclass
class Row:
    """One encoder, with all its seeds."""

    name: str
    encoders: list[str] = field(default_factory=list)  # stages


@dataclass
class Column:
    """One protocol."""

    name: str
    uses: str
    cells: dict[str, list[str]] = field(default_factory=dict)  # row -> evaluating stages, one a seed


def group(pipeline: Pipeline, plan: Plan) -> tuple[list[Row], list[Column]]:
    """Rows and columns of a pipeline's evaluations, in the order of its file.

    Raises:
        UsageError: no stage evaluates an encoder.
    """
    rows: dict[str, Row] = {}
    columns: dict[str, Column] = {}
    members: dict[str, list[tuple[str, str]]] = {}  # column -> (evaluating stage, encoder)
    for name, planned in plan.needed.items():
        if not pipeline.stages[name].stage.shows_metrics:
            continue
        encoders = list(dict.fromkeys(_encoders_of(planned, plan.needed)))
        if len(encoders) != 1:
            continue
        row = rows.setdefault(_shape(plan.needed[encoders[0]], plan.needed, seeds=False), Row(""))
        if encoders[0] not in row.encoders:
            row.encoders.append(encoders[0])
        key = _shape(planned, plan.needed, encoders=False)
        members.setdefault(key, []).append((name, encoders[0]))
        columns.setdefault(key, Column("", planned.uses))
    if not members:
        raise UsageError(f"{pipeline.file} has no stage that evaluates an encoder: there is nothing to compare")
    for row in rows.values():
        row.name = _common_name(row.encoders)
    _tell_apart(list(rows.values()))
    for key, column in columns.items():
        names = [_without(stage, encoder) for stage, encoder in members[key]]
        column.name = Counter(names).most_common(1)[0][0] or column.uses
        for stage, encoder in members[key]:
            row_name = next(row.name for row in rows.values() if encoder in row.encoders)
            column.cells.setdefault(row_name, []).append(stage)
    _tell_apart(list(columns.values()))
    return list(rows.values()), list(columns.values())


def _encoders_of(planned: PlannedStage, all_stages: Mapping[str, PlannedStage]) -> Iterator[str]:
    """The nearest encoders above an evaluation."""
    for feeder in planned.inputs.values():
        above = all_stages[feeder]
        if above.kind == ENCODER:
            yield feeder
        else:
            yield from _encoders_of(above, all_stages)


def _shape(
    planned: PlannedStage, all_stages: Mapping[str, PlannedStage], *, seeds: bool = True, encoders: bool = True
) -> str:
    """What a stage is, with all above it, as a text.

    Args:
        planned: the stage.
        all_stages: by name.
        seeds: whether seeds count.
        encoders: whether it counts which encoders stand above it.
    """
    what = planned.identity
    above = {
        path: ENCODER
        if not encoders and all_stages[feeder].kind == ENCODER
        else _shape(all_stages[feeder], all_stages, seeds=seeds, encoders=encoders)
        for path, feeder in planned.inputs.items()
    }
    settings = what["settings"] if seeds else _without_seeds(what["settings"])
    return json.dumps([what["uses"], what["version"], settings, what["sources"], above], sort_keys=True)


def _without_seeds(settings: Any) -> Any:
    if isinstance(settings, dict):
        return {key: _without_seeds(value) for key, value in settings.items() if key != SEED}
    if isinstance(settings, list):
        return [_without_seeds(value) for value in settings]
    return settings


def _common_name(names: list[str]) -> str:
    """What the names of one row have in common, without the seed's number at their end."""
    if len(names) == 1:
        return names[0]
    common = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in common).rstrip("_-0123456789") or names[0]


def _without(stage: str, encoder: str) -> str:
    """An evaluation's name without that of its encoder: "knn_dsa" of "dsa" is "knn"."""
    shorter = re.sub(rf"(^|[_-]){re.escape(encoder)}(?=$|[_-])", "", stage)
    return shorter.strip("_-")


def _tell_apart(named: list[Row] | list[Column]) -> None:
    """Number those that have the same name."""
    seen: Counter[str] = Counter()
    for one in named:
        seen[one.name] += 1
        if seen[one.name] > 1:
            one.name = f"{one.name} ({seen[one.name]})"
