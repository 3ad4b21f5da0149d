"""`tessera artifacts`: list, show, verify and clean what a pipeline or a store holds."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.options import (
    Json,
    MaybeConfig,
    Overrides,
    Store,
    config_and_targets,
    open_catalogue,
    print_json,
    store_of,
)
from pipeline.errors import UsageError

artifacts_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, show, check and clean artifacts.")


@artifacts_app.command("ls")
def artifacts_ls(
    config: MaybeConfig = None, overrides: Overrides = None, store: Store = None, as_json: Json = False
) -> None:
    """List the artifacts of a pipeline, or of a store."""
    from pipeline.cli.catalogue import rows

    found = rows(open_catalogue(config, overrides, store))
    if as_json:
        print_json(found)
    else:
        from pipeline.cli.printing import print_artifacts

        print_artifacts(found)


@artifacts_app.command("show")
def artifacts_show(
    names: Annotated[
        list[str],
        typer.Argument(metavar="[CONFIG] [ARTIFACT]...", help="Stages, kind/fingerprint (or its start), or addresses."),
    ],
    overrides: Overrides = None,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Print what artifacts hold and where they came from; of a pipeline alone, all of them."""
    config, targets = config_and_targets(names)
    catalogue = open_catalogue(config, overrides, store or store_of(targets))
    shown = [catalogue.one(target) for target in targets] if targets else catalogue.artifacts()
    if as_json:
        print_json([{"address": a.address, **a.manifest.model_dump(mode="json")} for a in shown])
    else:
        from pipeline.cli.printing import print_artifact

        for artifact in shown:
            print_artifact(artifact)


@artifacts_app.command("verify")
def artifacts_verify(
    config: MaybeConfig = None, overrides: Overrides = None, store: Store = None, as_json: Json = False
) -> None:
    """Read every byte again and name what is damaged (exit code 1 if anything is)."""
    from pipeline.cli.catalogue import verify
    from pipeline.cli.printing import print_damages
    from pipeline.run.display import RunDisplay

    with RunDisplay() as display:
        report = verify(open_catalogue(config, overrides, store), display)
    if as_json:
        print_json(report)
    else:
        print_damages(report)
    if report["damaged"]:
        raise typer.Exit(1)


@artifacts_app.command("gc")
def artifacts_gc(
    config: MaybeConfig = None,
    overrides: Overrides = None,
    store: Store = None,
    older_than: Annotated[float, typer.Option(metavar="HOURS", help="Leave what was touched since.")] = 24.0,
    unused: Annotated[
        bool, typer.Option("--unused", help="With CONFIG: also remove artifacts that this pipeline does not need.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: Json = False,
) -> None:
    """Remove what interrupted runs have left behind."""
    import datetime

    catalogue = open_catalogue(config, overrides, store)
    if unused and config is None:
        raise UsageError("--unused needs the pipeline whose artifacts are to stay: name its file")
    removed = catalogue.store.gc(
        set(catalogue.current.values()) if unused else None,
        older_than=datetime.timedelta(hours=older_than),
        dry_run=dry_run,
    )
    if as_json:
        rows = [{"path": row.path, "bytes": row.bytes, "reason": row.reason} for row in removed]
        print_json({"dry_run": dry_run, "removed": rows})
    else:
        from pipeline.cli.printing import print_removed

        print_removed(removed, dry_run=dry_run)
