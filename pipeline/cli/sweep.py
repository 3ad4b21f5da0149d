"""`tessera sweep`: many trials of a pipeline with other settings, compared by what one of its evaluations reports."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from pipeline.cli.options import Address, Config, Json, Overrides, Store, print_json

if TYPE_CHECKING:
    from pipeline.sweep.prepare import Estimate, Prepared
    from pipeline.sweep.sweep import SweepResult

SpaceOption = Annotated[
    str, typer.Option("--space", metavar="FILE", help="What is varied, how it is drawn, what decides.")
]
SWEEPS = Path(".tessera/sweeps")


def sweep(
    config: Config,
    space: SpaceOption,
    overrides: Overrides = None,
    store: Store = None,
    address: Address = None,
    to: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--to", metavar="FOLDER", help=f"For the result's files; default: a folder in {SWEEPS}."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it needs, and about how long.")] = False,
    as_json: Json = False,
) -> None:
    """Try many settings of a pipeline. The same command again continues it."""
    from pipeline.config.load import load_pipeline
    from pipeline.run.display import results_only_on_stdout
    from pipeline.store.store import ArtifactStore
    from pipeline.sweep.design import make_design
    from pipeline.sweep.display import SweepDisplay
    from pipeline.sweep.prepare import estimate, prepare
    from pipeline.sweep.record import Records
    from pipeline.sweep.space import SpaceFile

    file = SpaceFile(space)
    pipeline = load_pipeline(config, overrides or (), store)
    design = make_design(pipeline, file)
    opened = ArtifactStore(pipeline.store)
    prepared = prepare(design, file, opened)
    if dry_run:
        found = estimate(prepared, opened, Records(opened, prepared.sweep, pipeline.name).trials())
        print_json(vars(found)) if as_json else _print_estimate(found, prepared)
        return
    from pipeline.sweep.publish import write_files
    from pipeline.sweep.sweep import AllFailed, run_sweep

    try:
        with results_only_on_stdout(), SweepDisplay() as display:
            result = run_sweep(prepared, file, opened, display, address=address)
    except AllFailed as error:
        if as_json:
            print_json(error.result.to_json())
        for trace in dict.fromkeys(trial.trace for trial in error.result.ledger.failed if trial.trace):
            print(trace, file=sys.stderr)
        raise
    folder = Path(to) if to else SWEEPS / prepared.name
    written = write_files(result.files, folder)
    if as_json:
        print_json({**result.to_json(), "files": [str(path) for path in written]})
    else:
        _print_result(result, written, pipeline.tracking)


def _print_result(result: SweepResult, written: list[Path], tracking: str | None) -> None:
    from pipeline.cli.printing import print_table
    from pipeline.run.tracking import absolute_uri, how_to_open
    from pipeline.sweep import leaderboard
    from pipeline.sweep.publish import BEST

    columns, rows = leaderboard.table(result.ledger)
    print_table(f"sweep {result.prepared.sweep} of {result.prepared.design.pipeline.name}", columns, rows)
    print(leaderboard.remark(result.ledger))
    for path in written:
        note = "  (the best trial, all cached: `tessera run` it, or add stages)" if path.name == BEST else ""
        print(f"{path}{note}")
    if tracking:
        print(f"runs:  {how_to_open(absolute_uri(tracking))}")


def _print_estimate(found: Estimate, prepared: Prepared) -> None:
    from pipeline.run.display import duration

    design = prepared.design
    each = f", each with {len(design.seeds)} seeds" if len(design.seeds) > 1 else ""
    print(f"{found.trials} trials{each}" + (f", {found.kept} of them finished" if found.kept else ""))
    print(
        f"{found.needed} stage runs, of which {found.shared} are shared by all trials "
        f"({', '.join(prepared.shared) or 'none'}) and {found.cached} are cached; "
        f"{found.separate} as separate pipelines from an empty store"
    )
    left = found.needed - found.cached
    at_most = "at most " if design.space.scheduler != "none" else ""
    text = f"{at_most}{left} to run"
    if left and found.seconds:
        text += f", about {duration(found.seconds)} one after the other"
    print(text)
    if found.unknown and left:
        print(f"no earlier run has timed {', '.join(found.unknown)}: their time is not part of it")
