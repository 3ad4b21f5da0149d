"""Two pictures of a sweep, drawn by Optuna on matplotlib: every trial as a line, and how much each setting matters."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

from pipeline.sweep.draw import make_study
from pipeline.sweep.leaderboard import short_names

if TYPE_CHECKING:
    from pipeline.sweep.ledger import Ledger

LEAST = 4  # finished trials for an importance that means anything
EVALUATOR = "PED-ANOVA"


def pictures(ledger: Ledger) -> dict[str, bytes]:
    """File name -> PNG; without the pictures that so few trials do not make."""
    finished = [trial for trial in ledger.trials.values() if trial.state == "finished"]
    if len(finished) < 2:
        return {}
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from optuna.importance import PedAnovaImportanceEvaluator
    from optuna.visualization.matplotlib import plot_parallel_coordinate, plot_param_importances

    names = short_names(ledger.design)
    for trial in finished:
        assert trial.values.keys() == names.keys()
    study = make_study(ledger.design.space.space, ledger.design.mode, finished)
    drawn = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls its pictures experimental
        plot_parallel_coordinate(study, target_name=ledger.design.space.objective)
        drawn["parallel_coordinates.png"] = _png(plt, 2 + 1.8 * (1 + len(names)))
        varied = [p for p in names if len({repr(trial.values[p]) for trial in finished}) > 1]
        if len(finished) >= LEAST and varied:
            # Optuna's default evaluator differs between its versions: named, the picture means the same in all.
            axes = plot_param_importances(study, evaluator=PedAnovaImportanceEvaluator(), params=varied)
            axes.set_title(f"importance for {ledger.design.space.objective} ({EVALUATOR}, {len(finished)} trials)")
            drawn["importances.png"] = _png(plt, 9.0)
    return drawn


def _png(plt: object, width: float) -> bytes:
    figure = plt.gcf()  # type: ignore[attr-defined]
    figure.set_size_inches(max(width, 6.0), 4.5)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)  # type: ignore[attr-defined]
    return buffer.getvalue()
