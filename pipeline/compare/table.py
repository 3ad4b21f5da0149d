"""The comparison's cells: mean over seeds, interval, and whether a cell can be told from the best of its column.

Intervals are bootstrap percentiles: the test's units are drawn again, and with several seeds the seeds too. Cells of
one column see the same draws of the same units, so that a difference is judged by its own interval (paired).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.compare.grouping import Column, Row
from pipeline.config.load import Pipeline
from pipeline.store.artifact import Artifact

DRAWS = 2000
INTERVAL = (2.5, 97.5)  # percentiles

Verdict = Literal["best", "same", "worse", ""]  # beside the best of the column; "": nothing tells


@dataclass
class Cell:
    """One metric of one encoder in one protocol."""

    value: float  # the mean over the seeds
    low: float | None = None
    high: float | None = None
    spread: float | None = None  # standard deviation over the seeds; None with one seed
    verdict: Verdict = ""
    artifacts: list[str] = field(default_factory=list)  # addresses, one a seed

    def to_json(self) -> dict[str, Any]:
        """Its fields; those that nothing is known of are null."""
        return vars(self)


@dataclass
class Comparison:
    """The whole table."""

    pipeline: str
    rows: list[Row]
    columns: list[Column]
    units: dict[str, str]  # "column.metric" -> such as "%"
    metrics: dict[str, list[str]]  # column -> its metrics, the main one first
    cells: dict[tuple[str, str, str], Cell]  # (row, column, metric)

    def to_json(self) -> dict[str, Any]:
        """What `tessera compare --json` prints."""
        return {
            "pipeline": self.pipeline,
            "interval": "95 %, bootstrap over test units and seeds",
            "columns": [
                {"name": c.name, "uses": c.uses, "metrics": self.metrics[c.name], "units": self._units_of(c.name)}
                for c in self.columns
            ],
            "rows": [
                {
                    "encoder": row.name,
                    "stages": row.encoders,
                    "cells": {
                        c.name: {
                            metric: self.cells[row.name, c.name, metric].to_json()
                            for metric in self.metrics[c.name]
                            if (row.name, c.name, metric) in self.cells
                        }
                        for c in self.columns
                    },
                }
                for row in self.rows
            ],
        }

    def _units_of(self, column: str) -> dict[str, str]:
        return {m: self.units[f"{column}.{m}"] for m in self.metrics[column] if f"{column}.{m}" in self.units}


def compare(
    pipeline: Pipeline,
    rows: list[Row],
    columns: list[Column],
    artifacts: Mapping[str, Artifact],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Comparison:
    """Fill the table.

    Args:
        pipeline: as loaded.
        rows: of the table.
        columns: of the table.
        artifacts: of the evaluating stages by name; a cell whose stage has none stays empty.
        draws: bootstrap samples.
        seed: of the draws.
    """
    table = Comparison(pipeline.name, rows, columns, {}, {}, {})
    for column in columns:
        drawn: dict[tuple[str, str], NDArray[Any]] = {}
        first = pipeline.stages[next(iter(column.cells.values()))[0]].stage
        names: dict[str, None] = dict.fromkeys(first.units)
        for row, stages in column.cells.items():
            made = [artifacts[stage] for stage in stages if stage in artifacts]
            metrics = [name for name in _metrics_of(made) if not name.endswith("_random")]
            names |= dict.fromkeys(metrics)
            again = [
                pipeline.stages[stage].stage.resampled(artifacts[stage], draws, seed)
                for stage in stages
                if stage in artifacts
            ]
            for name in metrics:
                table.cells[row, column.name, name] = _cell(name, made)
                if all(name in one for one in again):
                    drawn[row, name] = _over_seeds([one[name] for one in again], seed)
        table.metrics[column.name] = [
            name for name in names if any(key[1:] == (column.name, name) for key in table.cells)
        ]
        table.units |= {f"{column.name}.{name}": unit for name, unit in first.units.items()}
        for name in table.metrics[column.name]:
            smaller = first.objectives.get(name) == "min"
            _judge({row.name: table.cells.get((row.name, column.name, name)) for row in rows}, name, drawn, smaller)
    return table


def _metrics_of(artifacts: Sequence[Artifact]) -> list[str]:
    """The metrics that all seeds have."""
    if not artifacts:
        return []
    return [name for name in artifacts[0].manifest.metrics if all(name in a.manifest.metrics for a in artifacts)]


def _cell(name: str, artifacts: Sequence[Artifact]) -> Cell:
    values = [artifact.manifest.metrics[name] for artifact in artifacts]
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Cell(float(np.mean(values)), spread=spread, artifacts=[artifact.address for artifact in artifacts])


def _over_seeds(drawn: Sequence[NDArray[Any]], seed: int) -> NDArray[Any]:
    """The mean over seeds that are drawn again too, (draws,)."""
    if len(drawn) == 1:
        return drawn[0]
    values_SR = np.stack(drawn)
    seeds, draws = values_SR.shape
    chosen_SR = np.random.default_rng((seed, seeds)).integers(0, seeds, (seeds, draws))
    means: NDArray[Any] = np.take_along_axis(values_SR, chosen_SR, axis=0).mean(axis=0)
    return means


def _judge(
    cells: Mapping[str, Cell | None], name: str, drawn: Mapping[tuple[str, str], NDArray[Any]], smaller: bool
) -> None:
    """Give the cells of one column and metric their intervals, and say which cannot be told from the best."""
    there = {row: cell for row, cell in cells.items() if cell is not None}
    for row, cell in there.items():
        if (row, name) in drawn:
            cell.low, cell.high = map(float, np.nanpercentile(drawn[row, name], INTERVAL))
    if len(there) < 2:
        return
    sign = -1 if smaller else 1
    best = max(there, key=lambda row: sign * there[row].value)
    there[best].verdict = "best"
    for row, cell in there.items():
        if row == best or (row, name) not in drawn or (best, name) not in drawn:
            continue
        behind = sign * (drawn[best, name] - drawn[row, name])
        cell.verdict = "same" if np.nanpercentile(behind, INTERVAL[0]) <= 0 else "worse"
