"""What is left of a sweep when it ends: a leaderboard, pictures and the best pipeline as files, and MLflow's runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.run.tracking import FAILED, FINISHED, Tracker
from pipeline.sweep import leaderboard
from pipeline.sweep.design import Setting
from pipeline.sweep.draw import sampler
from pipeline.sweep.plots import EVALUATOR, pictures

if TYPE_CHECKING:
    from pipeline.sweep.ledger import Ledger
    from pipeline.sweep.prepare import Prepared
    from pipeline.sweep.record import Trial

BEST, BOARD = "best.yaml", "leaderboard.csv"


def files(prepared: Prepared, ledger: Ledger) -> dict[str, bytes]:
    """Every file of a result: name -> content."""
    made = {BOARD: leaderboard.csv_text(ledger).encode(), **pictures(ledger)}
    best = ledger.best()
    if best is not None:
        made[BEST] = best_pipeline(prepared, best).encode()
    return made


def write_files(made: dict[str, bytes], folder: Path) -> list[Path]:
    """Put the files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in made.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in made]


def best_pipeline(prepared: Prepared, best: Trial) -> str:
    """The best trial as a pipeline file: what its objective needs, with the first seed. All of it is cached."""
    design = prepared.design
    pipeline = design.variant(Setting(best.values, design.seeds[0]))
    plain: dict[str, Any] = pipeline.plain()
    left_out = [name for name in plain["stages"] if name not in pipeline.stages]
    stages = {
        name: {"uses": entry.uses, **entry.stage.config.model_dump(mode="json", by_alias=True, exclude_unset=True)}
        for name, entry in pipeline.stages.items()
    }
    rung = best.rungs[-1]
    head = [
        f"Trial {best.number} of the sweep {prepared.sweep} over {pipeline.file.name}: {design.space.objective} "
        f"{leaderboard.figure(rung.value, rung.spread)}.",
        *(f"  {path} = {value}" for path, value in best.values.items()),
        "Only the stages that the objective needs"
        + (f"; not here: {', '.join(left_out)}." if left_out else ".")
        + " Its name is the one under which the trials' artifacts are used.",
    ]
    whole = {
        **{key: value for key, value in plain.items() if key not in ("description", "stages")},
        "name": prepared.name,
        "store": pipeline.store,
        "stages": stages,
    }
    order = ["name", "store", "tracking", *sorted(whole.keys() - {"name", "store", "tracking", "stages"}), "stages"]
    ordered = {key: whole[key] for key in order if key in whole}
    comment = "".join(f"# {line}\n" for line in head)
    return comment + yaml.dump(ordered, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=120)


class _Plain(yaml.SafeDumper):
    """Writes a value that occurs twice twice, and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


@dataclass
class Publisher:
    """MLflow: the sweep as a parent run, a child run for every trial that has ended."""

    prepared: Prepared
    ledger: Ledger
    tracker: Tracker
    sent: set[int] = field(default_factory=set)

    def start(self, *, required: bool = False) -> None:
        """Open the parent run, and send the trials that earlier commands have finished.

        Raises:
            TrackingAway: with `required`, the run cannot be opened.
        """
        space = self.prepared.design.space
        tags = {
            "tessera.pipeline": self.prepared.design.pipeline.name,
            "tessera.sweep": self.prepared.sweep,
            "tessera.objective": f"{space.objective} ({self.prepared.design.mode})",
            "tessera.search": f"{space.search}, {type(sampler(space, 0)).__name__}, seed {space.seed}",
            "tessera.scheduler": space.scheduler,
        }
        self.tracker.start(self.prepared.name, tags, required=required)
        for trial in list(self.ledger.trials.values()):
            self.trial(trial)

    def trial(self, trial: Trial) -> None:
        """Send a trial that has ended; one that is at work waits."""
        if trial.state == "running" or trial.number in self.sent or not self.tracker.is_on:
            return
        self.sent.add(trial.number)
        tags = {"tessera.trial": str(trial.number), "tessera.state": trial.state, "tessera.error": trial.error[:500]}
        artifacts = [name for rung in trial.rungs[-1:] for name in rung.artifacts]
        run = self.tracker.stage(
            f"trial {trial.number}", {**tags, "tessera.artifact": ", ".join(artifacts)[:5000]}, trial.values
        )
        for rung in trial.rungs:
            row = {"objective": rung.value, "seconds": rung.seconds}
            if rung.spread is not None:
                row["objective_spread"] = rung.spread
            run.log_metrics(row, rung.steps if rung.steps is not None else self._end())
        run.finish(FAILED if trial.state == "failed" else FINISHED)

    def finish(self, status: str, made: dict[str, bytes]) -> None:
        """Send the files, and close the parent run."""
        self.tracker.tag("tessera.importance", EVALUATOR)
        for name, data in made.items():
            self.tracker.attach(name, data)
        best = self.ledger.best()
        metrics = {} if best is None else {"best": best.rungs[-1].value, "best_trial": float(best.number)}
        self.tracker.finish(status, metrics)

    def _end(self) -> int:
        """A step behind the last rung, for what was found at the end of the training."""
        return max([*self.prepared.design.space.rung_steps, 0]) + 1
