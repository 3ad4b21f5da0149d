"""What a sweep has found, as rows: the best first, with what is too close to it to be told apart by its seeds."""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.sweep.design import Design
    from pipeline.sweep.ledger import Ledger
    from pipeline.sweep.record import Trial

CLOSE = 2.0  # standard errors of a difference of two means


def rows(ledger: Ledger) -> list[dict[str, Any]]:
    """One row a trial, in JSON's types."""
    best, design = ledger.best(), ledger.design
    return [
        {
            "rank": rank if trial.state == "finished" else None,
            "trial": trial.number,
            "state": trial.state,
            "steps": _steps(trial),
            "objective": trial.rungs[-1].value if trial.rungs else None,
            "spread": trial.rungs[-1].spread if trial.rungs else None,
            "seeds": len(design.seeds),
            "close_to_best": close(trial, best),
            "seconds": round(trial.seconds, 1),
            "values": trial.values,
            "error": trial.error,
        }
        for rank, trial in enumerate(ledger.ranked(), 1)
    ]


def close(trial: Trial, best: Trial | None) -> bool | None:
    """Whether a trial differs from the best by no more than its seeds do; None with one seed."""
    if best is None or trial is best or trial.state != "finished":
        return None
    one, other = best.rungs[-1], trial.rungs[-1]
    if one.spread is None or other.spread is None:
        return None
    error = ((one.spread**2 + other.spread**2) / len(one.by_seed)) ** 0.5
    return abs(one.value - other.value) <= CLOSE * error


def remark(ledger: Ledger) -> str:
    """What the figures do not show."""
    best = ledger.best()
    if best is None:
        return "no trial was finished"
    if sum(trial.state == "finished" for trial in ledger.trials.values()) < 2:
        return f"only trial {best.number} was finished: there is nothing to compare it with"
    if len(ledger.design.seeds) < 2:
        return (
            "one seed a setting: differences as small as those between two seeds mean nothing (`seeds: [0, 1, 2]` in "
            "the space shows them)"
        )
    near = [trial for trial in ledger.trials.values() if close(trial, best)]
    if not near:
        return f"the best differs from every other finished trial by more than {CLOSE:g} standard errors"
    several = f"{len(near)} trials differ" if len(near) > 1 else "1 trial differs"
    return f"{several} from the best by less than {CLOSE:g} standard errors: more seeds would tell them apart"


def table(ledger: Ledger) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and cells for the terminal."""
    names = short_names(ledger.design)
    columns = ("", "trial", "state", "steps", ledger.design.space.objective, "beside the best", *names.values(), "time")
    return columns, [_cells(row, ledger.design) for row in rows(ledger)]


def short_names(design: Design) -> dict[str, str]:
    """Swept path -> as few of its last words as tell it from the others."""
    found, paths = {}, [path.split(".") for path in design.space.space]
    for path in paths:
        words = 1
        while sum(other[-words:] == path[-words:] for other in paths) > 1 and words < len(path):
            words += 1
        found[".".join(path)] = ".".join(path[-words:])
    return found


def csv_text(ledger: Ledger) -> str:
    """The rows as CSV, a column for every swept path."""
    out = io.StringIO()
    paths = list(ledger.design.space.space)
    fixed = ["rank", "trial", "state", "steps", "objective", "spread", "seeds", "close_to_best", "seconds"]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*fixed, *paths, "error"])
    for row in rows(ledger):
        values = [
            value if isinstance(value, int | float | str) else json.dumps(value) for value in row["values"].values()
        ]
        writer.writerow([*(row[key] for key in fixed), *values, " ".join(row["error"].split())])
    return out.getvalue()


def figure(value: float, spread: float | None) -> str:
    """A mean with its spread."""
    return f"{value:.4g}" if spread is None else f"{value:.4g} ± {spread:.2g}"


def _cells(row: dict[str, Any], design: Design) -> tuple[str, ...]:
    from pipeline.run.display import duration

    beside = {True: "too close to tell", False: "worse", None: ""}[row["close_to_best"]]
    if row["state"] == "failed":
        beside = row["error"].split("\n")[0][:120]
    objective = "" if row["objective"] is None else figure(row["objective"], row["spread"])
    values = [value if isinstance(value, str) else json.dumps(value) for value in row["values"].values()]
    rank = "" if row["rank"] is None else str(row["rank"])
    return rank, str(row["trial"]), row["state"], row["steps"], objective, beside, *values, duration(row["seconds"])


def _steps(trial: Trial) -> str:
    if not trial.rungs:
        return ""
    steps = trial.rungs[-1].steps
    return "all" if steps is None else str(steps)
