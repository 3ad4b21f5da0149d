"""`tessera artifacts`: list, show, verify and clean what a pipeline or a store holds."""

from __future__ import annotations

import sys
from typing import Annotated, Optional

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

Names = Annotated[
    list[str],
    typer.Argument(metavar="[CONFIG] [ARTIFACT]...", help="Stages, kind/fingerprint (or its start), or addresses."),
]
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
    names: Names,
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


@artifacts_app.command("pin")
def artifacts_pin(
    names: Names,
    overrides: Overrides = None,
    store: Store = None,
    undo: Annotated[bool, typer.Option("--undo")] = False,
) -> None:
    """Keep artifacts from removal by `gc`, whatever any pipeline needs; --undo lets them go again."""
    from pipeline.store import uses

    config, targets = config_and_targets(names)
    if not targets:
        raise UsageError("name the artifacts: stages of the pipeline, kind/fingerprint, or addresses")
    catalogue = open_catalogue(config, overrides, store or store_of(targets))
    for artifact in [catalogue.one(target) for target in targets]:
        if not undo:
            uses.pin(artifact.objects, artifact.name)
            print(f"pinned: {artifact.name} (stage '{artifact.manifest.stage}')")
        elif uses.unpin(artifact.objects, artifact.name):
            print(f"no longer pinned: {artifact.name} (stage '{artifact.manifest.stage}')")
        else:
            print(f"was not pinned: {artifact.name} (stage '{artifact.manifest.stage}')")


@artifacts_app.command("gc")
def artifacts_gc(
    configs: Annotated[
        Optional[list[str]],  # noqa: UP045  # typer reads the annotation at run time
        typer.Argument(metavar="[CONFIG]...", help="Pipeline files; leave them out with --store for a whole store."),
    ] = None,
    overrides: Overrides = None,
    store: Store = None,
    older_than: Annotated[float, typer.Option(metavar="HOURS", help="Leave what was touched or used since.")] = 24.0,
    unused: Annotated[
        bool,
        typer.Option("--unused", help="Also remove what only you and these pipelines used, and not now."),
    ] = False,
    also_others: Annotated[
        bool, typer.Option("--also-others", help="With --unused: also what other pipelines and users made or used.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before artifacts are removed.")] = False,
    as_json: Json = False,
) -> None:
    """Remove what interrupted runs have left behind and, when asked, artifacts that are not used."""
    import datetime

    from pipeline.cli.catalogue import unused_artifacts
    from pipeline.cli.printing import print_kept, print_removed
    from pipeline.store.uses import Verdict

    if unused and not configs:
        raise UsageError("--unused needs the pipelines whose artifacts are to stay: name their files")
    if also_others and not unused:
        raise UsageError("--also-others says which unused artifacts may go: give --unused too")
    if overrides and len(configs or ()) > 1:
        raise UsageError("--set changes one pipeline: name one file")
    files: list[str | None] = [*configs] if configs else [None]
    catalogues = [open_catalogue(config, overrides, store) for config in files]
    if len({catalogue.store.address for catalogue in catalogues}) > 1:
        raise UsageError("these pipelines have different stores: name them one by one, or say --store")
    opened, age = catalogues[0].store, datetime.timedelta(hours=older_than)
    verdict = unused_artifacts(catalogues, also_others) if unused else Verdict()
    listed = opened.gc(verdict.unneeded, older_than=age, dry_run=True)
    doomed = [item for item in listed if item.artifact is not None]
    if not as_json:
        print_kept(verdict)
    if doomed and not (dry_run or yes):
        if as_json or not sys.stdin.isatty():
            raise UsageError(
                f"{len(doomed)} artifacts would be removed, and there is no terminal to ask on: give --yes to remove "
                "them, or --dry-run to list them"
            )
        print_removed(listed, dry_run=True)
        if not typer.confirm(f"Remove these {len(doomed)} artifacts from {opened.address}?", err=True):
            print("nothing was removed")
            raise typer.Exit(1)
    removed = listed if dry_run else opened.gc(verdict.unneeded, older_than=age)
    if as_json:
        rows = [
            {"path": row.path, "bytes": row.bytes, "reason": row.reason, "made_by": row.made_by, "made": row.made}
            for row in removed
        ]
        kept = [{"artifact": "/".join(name), "reason": reason} for name, reason in verdict.kept.items()]
        print_json({"dry_run": dry_run, "removed": rows, "kept": kept})
    else:
        print_removed(removed, dry_run=dry_run)
