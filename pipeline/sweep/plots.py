"""Two pictures of a sweep, drawn by Optuna on matplotlib: every trial as a line, and how much each setting matters."""

from __future__ import annotations

import io
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.sweep.draw import make_study
from pipeline.sweep.leaderboard import short_names

if TYPE_CHECKING:
    from pipeline.sweep.ledger import Ledger
    from pipeline.sweep.record import Trial

LEAST = 4  # trials for an importance that means anything
EVALUATOR = "PED-ANOVA"


def pictures(ledger: Ledger) -> dict[str, bytes]:
    """File name -> PNG; without the pictures that so few trials do not make.

    Compared are the trials at the last rung that at least half of them have reached: a scheduler leaves only few to
    their end.
    """
    rung, compared = _comparable(ledger)
    if len(compared) < 2:
        return {}
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from optuna.importance import PedAnovaImportanceEvaluator
    from optuna.visualization.matplotlib import plot_parallel_coordinate, plot_param_importances

    design, names = ledger.design, short_names(ledger.design)
    steps = design.rungs[rung]
    title = f"{design.space.objective} " + ("at the end" if steps is None else f"at step {steps}")
    study = make_study({names[path]: d for path, d in design.space.space.items()}, design.mode, compared)
    drawn = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls its pictures experimental
        axes = plot_parallel_coordinate(study, target_name=design.space.objective)
        axes.set_title(f"{title}, {len(compared)} trials")
        drawn["parallel_coordinates.png"] = _png(plt, 2 + 1.8 * (1 + len(names)))
        varied = [name for name in names.values() if len({repr(trial.values[name]) for trial in compared}) > 1]
        if len(compared) >= LEAST and varied:
            # Optuna's default evaluator differs between its versions: named, the picture means the same in all.
            axes = plot_param_importances(study, evaluator=PedAnovaImportanceEvaluator(), params=varied)
            axes.set_title("", loc="left")
            axes.set_title(f"importance for {title} ({EVALUATOR}, {len(compared)} trials)")
            drawn["importances.png"] = _png(plt, 9.0)
    return drawn


def _comparable(ledger: Ledger) -> tuple[int, list[Trial]]:
    """A rung, and the trials that have reached it, as if it were their end, with short names of their settings."""
    names, found = short_names(ledger.design), [trial for trial in ledger.trials.values() if trial.over]
    for rung in reversed(range(len(ledger.design.rungs))):
        reached = [(trial, at) for trial in found for at in trial.rungs if at.index == rung]
        if 2 * len(reached) >= len(found):
            break
    return rung, [
        replace(trial, state="finished", rungs=[at], values={names[path]: trial.values[path] for path in names})
        for trial, at in reached
    ]


def _png(plt: object, width: float) -> bytes:
    figure = plt.gcf()  # type: ignore[attr-defined]
    figure.set_size_inches(max(width, 6.0), 4.5)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)  # type: ignore[attr-defined]
    return buffer.getvalue()
