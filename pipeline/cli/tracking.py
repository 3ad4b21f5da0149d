"""`tessera tracking`: what runs could not tell MLflow while it was away, and sending it."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from pipeline.cli.options import Json, MaybePipeline, Overrides, print_json

tracking_app = typer.Typer(help="Records that wait for MLflow, and sending them.", no_args_is_help=True)

To = Annotated[
    Optional[str],  # noqa: UP045  # typer reads the annotation at run time
    typer.Option("--to", metavar="ADDRESS", help="The tracking address, where no pipeline is named."),
]


@tracking_app.command("ls")
def list_waiting(as_json: Json = False) -> None:
    """List the runs whose records wait on this machine."""
    from pipeline.run.tracking.journal import leftovers

    rows: list[dict[str, Any]] = []
    for journal in leftovers():
        about = journal.about
        rows.append(
            {
                "run": journal.folder.name,
                "pipeline": about["experiment"],
                "address": about["address"],
                "records": journal.waiting,
                "folder": str(journal.folder),
            }
        )
        journal.close(delete=False)
    if as_json:
        print_json(rows)
        return
    from pipeline.cli.printing import print_table

    shown = ("run", "pipeline", "address", "records")
    print_table("records that wait", shown, [tuple(str(row[name]) for name in shown) for row in rows])


@tracking_app.command()
def send(config: MaybePipeline = None, overrides: Overrides = None, to: To = None, as_json: Json = False) -> None:
    """Send the records that wait; without a pipeline or an address, those for every address.

    What a run that goes on has to tell is left to that run. User and password are read as MLflow reads them.
    """
    from pipeline.config.load import load_pipeline
    from pipeline.errors import UsageError
    from pipeline.run.tracking.address import absolute_uri
    from pipeline.run.tracking.sender import send_now

    if overrides and config is None:
        raise UsageError("--set changes a pipeline: name its file too")
    address = to or (load_pipeline(config, overrides or ()).tracking if config is not None else None)
    if config is not None and address is None:
        raise UsageError(f"{config}: tracking is null, so that nothing waits for it")
    sent = send_now(absolute_uri(address) if address else None)
    if as_json:
        print_json({"runs": sent})
    else:
        print(f"sent the records of {sent} runs" if sent else "no records wait")
