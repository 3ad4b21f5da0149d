"""Which settings a sweep tries: drawn by Optuna's samplers, or gone through one by one.

A draw depends on the space, its seed, the trial's number and, with `search: optuna`, on the trials known by then.
So a sweep that continues draws what it would have drawn. (Tune's own wrapper of Optuna seeds its sampler once: after
a restart it would draw its first settings again.)
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

_MARK = "json:"  # what the text of a list or a mapping begins with

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.study import Study

    from pipeline.sweep.record import Trial
    from pipeline.sweep.space import Dimension, Space


def draw(space: Space, mode: str, number: int, known: Iterable[Trial] = ()) -> dict[str, Any]:
    """The settings of one trial: dotted path -> value.

    Args:
        space: as read.
        mode: "max" or "min".
        number: of the trial, from 0.
        known: trials so far; only `search: optuna` looks at them.
    """
    gone_through = [path for path, d in space.space.items() if d.grid is not None or space.search == "grid"]
    chosen: dict[str, Any] = {}
    if gone_through:
        lists = [space.space[path].values for path in gone_through]
        at = number % space.combinations
        chosen = dict(zip(gone_through, next(itertools.islice(itertools.product(*lists), at, None)), strict=True))
    drawn = {path: d for path, d in space.space.items() if path not in chosen}
    if drawn:
        study = make_study(drawn, mode, known if space.search == "optuna" else (), sampler(space, number))
        asked = study.ask(fixed_distributions={path: distribution(d) for path, d in drawn.items()})
        chosen |= {path: _decoded(asked.params[path], d) for path, d in drawn.items()}
    return {path: chosen[path] for path in space.space}


def sampler(space: Space, number: int) -> BaseSampler:
    """What draws one trial."""
    import optuna

    seed = int.from_bytes(hashlib.sha256(f"{space.seed} {number}".encode()).digest()[:4], "big")
    if space.search != "optuna":
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # options that a newer Optuna means to rename
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)


def make_study(
    dimensions: Mapping[str, Dimension], mode: str, known: Iterable[Trial], sampler: BaseSampler | None = None
) -> Study:
    """The trials as an Optuna study: those that were stopped as pruned, those at work as running.

    Args:
        dimensions: dotted path -> values, of the settings that belong to the study.
        mode: "max" or "min".
        known: trials, whatever became of them; failed ones are left out.
        sampler: of further trials.
    """
    import optuna
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("optuna").setLevel(logging.ERROR)
    study = optuna.create_study(direction="maximize" if mode == "max" else "minimize", sampler=sampler)
    states = {"finished": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "running": TrialState.RUNNING}
    distributions = {path: distribution(d) for path, d in dimensions.items()}
    for trial in known:
        if trial.state in states:
            study.add_trial(
                create_trial(
                    state=states[trial.state],
                    value=trial.rungs[-1].value if trial.state == "finished" else None,
                    params={path: encoded(trial.values[path]) for path in dimensions},
                    distributions=distributions,
                    intermediate_values={rung.index: rung.value for rung in trial.rungs},
                )
            )
    return study


def distribution(dimension: Dimension) -> BaseDistribution:
    """A dimension in Optuna's terms."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if dimension.bounds is None:
        return CategoricalDistribution(list(dict.fromkeys(map(encoded, dimension.values))))
    return FloatDistribution(*dimension.bounds, log=dimension.loguniform is not None)


def encoded(value: Any) -> Any:
    """A value as Optuna takes it: a list or a mapping becomes text."""
    return f"{_MARK}{json.dumps(value, sort_keys=True)}" if isinstance(value, list | dict) else value


def _decoded(value: Any, dimension: Dimension) -> Any:
    if isinstance(value, str) and value.startswith(_MARK):
        return json.loads(value.removeprefix(_MARK))
    if dimension.bounds is not None:  # six digits are enough, and can be read
        low, high = dimension.bounds
        return min(max(float(f"{value:.6g}"), low), high)
    return value
