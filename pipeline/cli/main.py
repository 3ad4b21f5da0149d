"""The `tessera` command. Commands only wire: parse, build, run, report.

`tessera --help` must answer in half a second: nothing heavier than typer is imported before a command runs.
Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 a stage failed or damage was
found, 2 wrong usage or config, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from pipeline.cli.artifacts import artifacts_app
from pipeline.cli.options import (
    Address,
    Config,
    Force,
    From,
    Json,
    MaybeConfig,
    Only,
    Overrides,
    Store,
    config_and_targets,
    open_catalogue,
    print_json,
    split_names,
    store_of,
)
from pipeline.errors import TesseraError, UsageError

if TYPE_CHECKING:
    from pipeline.config.load import Pipeline
    from pipeline.plan.plan import Plan
    from pipeline.store.store import ArtifactStore

INTERRUPTED, TERMINATED = 130, 143

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: importing rich for it would cost a tenth of a second
    pretty_exceptions_enable=False,
    help="From unlabelled images to a vision encoder with good dense features: a cached pipeline on Ray.",
)
app.add_typer(artifacts_app, name="artifacts")


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    only: Only = None,
    from_: From = None,
    force: Force = None,
    store: Store = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Compute what is not cached, stage by stage."""
    from pipeline.cli.printing import print_closing, print_results
    from pipeline.run import runner
    from pipeline.run.display import RunDisplay, results_only_on_stdout

    pipeline, opened, plan = _planned(config, overrides, only, from_, force, store)
    try:
        with results_only_on_stdout(), RunDisplay() as display:
            result = runner.run(pipeline, plan, opened, display, address=address)
    except runner.RunFailed as failure:
        if as_json:
            print_json(failure.result.to_json())
        if failure.is_bug:
            traceback.print_exception(failure.__cause__)
        raise
    if as_json:
        print_json(result.to_json())
    else:
        print_results(result.to_json())
        print_closing(result.to_json(), opened.address, pipeline.tracking)


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    only: Only = None,
    from_: From = None,
    force: Force = None,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Say which stages are cached, which must run, and why."""
    _, _, made = _planned(config, overrides, only, from_, force, store)
    if as_json:
        print_json(made.to_json())
    else:
        from pipeline.cli.printing import print_plan

        print_plan(made.to_json())


@app.command()
def lineage(
    names: Annotated[
        list[str],
        typer.Argument(metavar="ARTIFACT [CONFIG]", help="A stage, kind/fingerprint (or its start), or an address."),
    ],
    overrides: Overrides = None,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Walk back to the sources of an artifact and forward to everything made from it."""
    from pipeline.store.lineage import Graph, tree

    config, targets = config_and_targets(names)
    if len(targets) != 1:
        raise UsageError("lineage takes one artifact or stage, and the pipeline file of the stage")
    catalogue = open_catalogue(config, overrides, store or store_of(targets))
    target = catalogue.one(targets[0])
    graph = Graph.of(catalogue.store.artifacts()).around(target.name)
    if as_json:
        print_json({"target": target.name, **graph.to_json()})
    else:
        from pipeline.cli.printing import stdout

        stdout().print(tree(graph, target.name), soft_wrap=True)


@app.command()
def export(
    names: Annotated[
        list[str],
        typer.Argument(metavar="ARTIFACT [CONFIG]", help="A stage, kind/fingerprint (or its start), or an address."),
    ],
    to: Annotated[str, typer.Option("--to", metavar="FOLDER", help="Where the files go; made if it is missing.")],
    overrides: Overrides = None,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Copy the files that an artifact offers for use elsewhere, under their plain names, into a folder."""
    from pipeline.cli.catalogue import export as copy_out
    from pipeline.config import registry

    config, targets = config_and_targets(names)
    if len(targets) != 1:
        raise UsageError("export takes one artifact or stage, and the pipeline file of the stage")
    artifact = open_catalogue(config, overrides, store or store_of(targets)).one(targets[0])
    copied = copy_out(artifact, to)
    if registry.stage_class(artifact.manifest.uses) is None:
        typer.echo(f"stage type '{artifact.manifest.uses}' is not installed here: all files are copied", err=True)
    if as_json:
        print_json({"artifact": artifact.address, "files": [str(path) for path in copied]})
    else:
        typer.echo("\n".join(str(path) for path in copied))


@app.command()
def schema() -> None:
    """Print the JSON schema of pipeline files, for editors that complete and check them."""
    from pipeline.config.schema import pipeline_schema

    print_json(pipeline_schema())


@app.command()
def doctor(config: MaybeConfig = None, store: Store = None, address: Address = None, as_json: Json = False) -> None:
    """Check what a long run needs: versions, Ray, disk, store, tracking (exit code 1 if something fails)."""
    from pipeline.cli.printing import print_checks
    from pipeline.config.load import DEFAULT_STORE, DEFAULT_TRACKING, load_pipeline
    from pipeline.run.doctor import FAIL, examine
    from pipeline.store.store import ArtifactStore

    pipeline = load_pipeline(config, (), store) if config else None
    opened = ArtifactStore(pipeline.store if pipeline else store or DEFAULT_STORE)
    checks = list(examine(opened, pipeline.tracking if pipeline else DEFAULT_TRACKING, address))
    if as_json:
        print_json({"checks": [check.to_json() for check in checks]})
    else:
        print_checks([check.to_json() for check in checks])
    if any(check.state == FAIL for check in checks):
        raise typer.Exit(1)


def _planned(
    config: str,
    overrides: list[str] | None,
    only: list[str] | None,
    from_: list[str] | None,
    force: list[str] | None,
    store: str | None,
) -> tuple[Pipeline, ArtifactStore, Plan]:
    from pipeline.config.load import load_pipeline
    from pipeline.plan.plan import make_plan
    from pipeline.run.display import RunDisplay
    from pipeline.store.store import ArtifactStore

    pipeline = load_pipeline(config, overrides or (), store)
    opened = ArtifactStore(pipeline.store)
    with RunDisplay() as display:
        made = make_plan(
            pipeline,
            opened,
            split_names(only),
            split_names(from_),
            split_names(force),
            lambda source, *progress: display.watch(f"reading {source}", *progress),
        )
    return pipeline, opened, made


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    terminated = False

    def terminate(signum: int, frame: object) -> NoReturn:
        nonlocal terminated
        terminated = True
        raise SystemExit(TERMINATED)  # unwinds like Ctrl-C: leases are given back, Ray is shut down

    signal.signal(signal.SIGTERM, terminate)
    try:
        code = app(args=list(arguments) if arguments is not None else None, standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # what typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except TesseraError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort, SystemExit) as stop:
        if isinstance(stop, SystemExit) and not terminated:
            raise
        print("stopped; what was finished is kept, the same command continues", file=sys.stderr)
        return TERMINATED if terminated else INTERRUPTED  # Ray turns a SystemExit of ours into one of its own
    except BrokenPipeError:  # `tessera plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if not (hasattr(error, "show") and hasattr(error, "exit_code")):
            raise
        error.show()  # the parser's own errors: unknown option, missing argument
        return int(error.exit_code)


if __name__ == "__main__":
    sys.exit(main())
