"""`tessera doctor`: whether this machine, the store, the tracking server and Ray are fit for a long run."""

from __future__ import annotations

import typer

from pipeline.cli.options import Address, Json, MaybeConfig, Overrides, Store, print_json
from pipeline.errors import UsageError


def doctor(
    config: MaybeConfig = None,
    overrides: Overrides = None,
    store: Store = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Check what a run would trip over: versions, Ray, resources, disk, store, tracking, the plan (exit code 1)."""
    from pipeline.cli.printing import print_checks
    from pipeline.config.load import DEFAULT_STORE, DEFAULT_TRACKING, load_pipeline
    from pipeline.run.doctor import FAIL, examine
    from pipeline.store.store import ArtifactStore

    if overrides and not config:
        raise UsageError("--set changes a pipeline: name its file too")
    pipeline = load_pipeline(config, overrides or (), store) if config else None
    opened = ArtifactStore(pipeline.store if pipeline else store or DEFAULT_STORE)
    checks = list(examine(opened, pipeline.tracking if pipeline else DEFAULT_TRACKING, address, pipeline))
    if as_json:
        print_json({"checks": [check.to_json() for check in checks]})
    else:
        print_checks([check.to_json() for check in checks])
    if any(check.state == FAIL for check in checks):
        raise typer.Exit(1)
