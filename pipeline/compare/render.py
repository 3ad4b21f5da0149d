"""A comparison as text: for the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io

from pipeline.compare.table import Cell, Comparison

LEGEND = (
    "Means with 95 % intervals (bootstrap over test units and seeds). **: best of its column; ≈: cannot be told from "
    "the best (the interval of the difference holds 0)."
)


def lines(table: Comparison, *, all_metrics: bool = False) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of cells; the main metric of each protocol, or all."""
    chosen = [
        (column.name, metric)
        for column in table.columns
        for metric in (table.metrics[column.name] if all_metrics else table.metrics[column.name][:1])
    ]
    heads = ["encoder", *(_head(table, column, metric) for column, metric in chosen)]
    body = [
        [row.name + (f" ({len(row.encoders)} seeds)" if len(row.encoders) > 1 else "")]
        + [cell_text(table.cells.get((row.name, column, metric))) for column, metric in chosen]
        for row in table.rows
    ]
    return heads, body


def cell_text(cell: Cell | None) -> str:
    """Such as "45.2** [44.1, 46.0] ±0.8"."""
    if cell is None:
        return ""
    digits = 1 if abs(cell.value) >= 10 else 3
    text = f"{cell.value:.{digits}f}" + {"best": "**", "same": "≈"}.get(cell.verdict, "")
    if cell.low is not None and cell.high is not None:
        text += f" [{cell.low:.{digits}f}, {cell.high:.{digits}f}]"
    return text + (f" ±{cell.spread:.{digits}f}" if cell.spread is not None else "")


def markdown(table: Comparison, *, all_metrics: bool = False) -> str:
    """A table of a Markdown page, with its legend."""
    heads, body = lines(table, all_metrics=all_metrics)
    escaped = [[cell.replace("**", r"\*\*").replace("|", r"\|") for cell in row] for row in body]
    rows = [heads, ["---"] * len(heads), *escaped]
    legend = LEGEND.replace("**", r"\*\*")
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{legend}\n"


def as_csv(table: Comparison) -> str:
    """One line a cell: encoder, protocol, metric, value, low, high, spread, seeds, verdict."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["encoder", "protocol", "metric", "unit", "value", "low", "high", "spread", "seeds", "verdict"])
    for (row, column, metric), cell in table.cells.items():
        unit = table.units.get(f"{column}.{metric}", "")
        figures = [cell.value, cell.low, cell.high, cell.spread]
        writer.writerow([row, column, metric, unit, *figures, len(cell.artifacts), cell.verdict])
    return out.getvalue()


def _head(table: Comparison, column: str, metric: str) -> str:
    unit = table.units.get(f"{column}.{metric}", "")
    return f"{column}: {metric}" + (f" ({unit})" if unit else "")
