"""Trials on Ray Tune: its scheduler decides which go on, its processes stay from trial to trial.

Tune keeps nothing that a sweep needs: what is known is in the ledger's records, and is told to the scheduler again when
a sweep continues.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from pipeline.sweep import trial as t
from pipeline.sweep.record import Rung

if TYPE_CHECKING:
    from pipeline.store.store import ArtifactStore
    from pipeline.sweep.design import Design
    from pipeline.sweep.ledger import Ledger
    from pipeline.sweep.slots import Slots

NESTED = 1 << 20  # bytes: Tune wants a trial to reserve something, and its CPUs belong to the workers of its stages
LOST = 2  # times that a trial begins again because its process was lost
QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no log files of Tune's beside our records
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a failed trial has no figures
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends a sweep as it ends a run
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths in a pipeline are relative to the user's folder
}


class _OnlyHere:
    """Part of what Tune pickles when an experiment begins, so that it could restore it, which a sweep never asks."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Proposals(_OnlyHere, Searcher):
    """Hands the ledger's trials to Tune, and what Tune says of them to the ledger."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(metric=t.OBJECTIVE, mode=ledger.design.mode)
        self.ledger = ledger
        self.numbers: dict[str, int] = {}  # Tune's id of a trial -> its number

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next trial."""
        trial = None if self.ledger.hopeless else self.ledger.next_trial()
        if trial is None:
            return Searcher.FINISHED
        self.numbers[trial_id] = trial.number
        return {"number": trial.number, "values": json.dumps(trial.values)}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """A rung after which the trial goes on."""
        self._note(self.numbers[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The end of a trial, whatever it is."""
        number = self.numbers[trial_id]
        if error or not result:
            self.ledger.fail(number, f"its process was lost {LOST + 1} times (killed, or out of memory)")
        elif t.FAILED in result:
            self.ledger.warn(number, json.loads(result[t.WARNINGS]))
            self.ledger.fail(number, result[t.FAILED], result[t.TRACE])
        else:
            self._note(number, result)
            if not result[t.ENDED]:
                self.ledger.stop(number)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the records are in the store."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""

    def _note(self, number: int, result: dict[str, Any]) -> None:
        if t.REPORT in result:
            self.ledger.warn(number, json.loads(result[t.WARNINGS]))
            self.ledger.add(number, Rung(**json.loads(result[t.REPORT])))


class _WhenHopeless(_OnlyHere, tune.Stopper):
    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.ledger.hopeless


class _Began(_OnlyHere, tune.Callback):
    """Calls a function when the first trial is on its way, so that what it does costs no time of the trials."""

    def __init__(self, began: Callable[[], None]) -> None:
        self.began: Callable[[], None] | None = began

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        began, self.began = self.began, None
        if began is not None:
            began()


@dataclass(frozen=True)
class _Known:
    """A trial of an earlier command, for a scheduler."""

    trial_id: str


def run_trials(
    design: Design, store: ArtifactStore, ledger: Ledger, slots: Slots, name: str, began: Callable[[], None]
) -> None:
    """Run what is left of a sweep. Ray is connected.

    Args:
        design: of the sweep.
        store: where its artifacts are.
        ledger: of its trials; gets what they find.
        slots: for trials.
        name: under which the trials' artifacts are used.
        began: called once, when the first trial has started.
    """
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    for noisy in ("ray.tune", "ray.train"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # what fails is in our own lines
    trainable = tune.with_parameters(t.TrialProcess, design=design, store=store, name=name)
    resources = {"CPU": slots.cpus, "GPU": slots.gpus} if slots.cpus else {"memory": NESTED}
    with tempfile.TemporaryDirectory(prefix="tessera-sweep-") as folder:
        tuner = tune.Tuner(
            tune.with_resources(trainable, resources),
            tune_config=tune.TuneConfig(
                search_alg=Proposals(ledger),
                scheduler=make_scheduler(design, ledger),
                num_samples=ledger.left,
                max_concurrent_trials=slots.count,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: f"trial-{trial.trial_id}",
            ),
            run_config=tune.RunConfig(
                name=name,
                storage_path=folder,
                verbose=0,
                stop=_WhenHopeless(ledger),
                failure_config=tune.FailureConfig(max_failures=LOST),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the stages keep their own
                callbacks=[_Began(began)],
            ),
        )
        tuner.fit()


def make_scheduler(design: Design, ledger: Ledger) -> TrialScheduler:
    """Tune's scheduler, told what the trials of earlier commands have found."""
    space = design.space
    compared = {"time_attr": t.PROGRESS, "metric": t.OBJECTIVE, "mode": design.mode}
    scheduler: TrialScheduler
    if space.scheduler == "asha":
        longest = math.ceil(t.progress(design, len(space.rung_steps)) + 1)  # a trial ends by itself
        scheduler = ASHAScheduler(**compared, max_t=longest, grace_period=1, reduction_factor=space.reduction)
    elif space.scheduler == "median":
        # A trial that no other can be compared with goes on, and does not make room for others.
        scheduler = MedianStoppingRule(**compared, grace_period=1, min_samples_required=3, min_time_slice=math.inf)
    else:
        return FIFOScheduler()
    for trial in ledger.over:
        known = _Known(f"known-{trial.number}")
        scheduler.on_trial_add(None, known)
        for rung in trial.rungs:
            scheduler.on_trial_result(
                None, known, {t.OBJECTIVE: rung.value, t.PROGRESS: t.progress(design, rung.index)}
            )
    return scheduler
