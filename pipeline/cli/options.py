"""Arguments and options that several commands share, and what they mean. Imports nothing heavier than typer."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.cli.catalogue import Catalogue

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A pipeline file.", show_default=False)]
MaybeConfig = Annotated[
    Optional[str],  # noqa: UP045  # typer reads the annotation at run time
    typer.Argument(metavar="[CONFIG]", help="A pipeline file; leave it out with --store for the whole store."),
]
MaybePipeline = Annotated[
    Optional[str],  # noqa: UP045
    typer.Argument(metavar="[CONFIG]", help="A pipeline file.", show_default=False),
]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--set", metavar="PATH=VALUE", help="Override one value, e.g. stages.superpixels.region_size=16."),
]
Only = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--only",
        metavar="STAGE",
        help="Only these stages, from cached inputs (repeat it, or separate names by commas).",
    ),
]
From = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--from", metavar="STAGE", help="These stages, what depends on them, and what they need."),
]
Force = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--force", metavar="STAGE", help="Compute these stages anew though they are cached."),
]
Store = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--store", metavar="ADDRESS", help="Folder, s3://, gs:// or az:// address; beats the pipeline's."),
]
Address = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--address", help="host:port of a Ray cluster to join; default RAY_ADDRESS, else a local Ray."),
]
KeepGoing = Annotated[
    bool, typer.Option("--keep-going", help="When a stage fails, run those that do not need it; exit code 1.")
]
Parallel = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--parallel", metavar="N", min=1, help="At most N stages at once; default: as many as have room."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, for programs.")]


def open_catalogue(config: str | None, overrides: list[str] | None, store: str | None) -> Catalogue:
    """The artifacts that a command is about.

    Args:
        config: a pipeline file; None for all artifacts of the store.
        overrides: of the pipeline file, as after `--set`.
        store: an address; None for the pipeline's, or the default.

    Raises:
        UsageError: neither a pipeline nor a store is named, and the default store is not there.
    """
    from pipeline.cli.catalogue import Catalogue
    from pipeline.config.load import DEFAULT_STORE, load_pipeline
    from pipeline.store.store import ArtifactStore

    if config is not None:
        pipeline = load_pipeline(config, overrides or (), store)
        return Catalogue(ArtifactStore(pipeline.store), pipeline)
    if overrides:
        raise UsageError("--set changes a pipeline: name its file too")
    if store is None and not os.path.isdir(DEFAULT_STORE):
        raise UsageError(
            f"no pipeline and no store: name a pipeline file, or --store ADDRESS ({DEFAULT_STORE} is not here)"
        )
    return Catalogue(ArtifactStore(store or DEFAULT_STORE), None)


def split_names(options: list[str] | None) -> list[str]:
    """The names in a repeated option, each of whose values may hold several, separated by commas."""
    return [name for option in options or () for name in option.split(",") if name]


def config_and_targets(names: list[str]) -> tuple[str | None, list[str]]:
    """The pipeline file among the arguments, whichever it is, and the other arguments."""
    configs = [name for name in names if name.endswith((".yaml", ".yml"))]
    if len(configs) > 1:
        raise UsageError(f"one pipeline file at a time: {', '.join(configs)}")
    return (configs[0] if configs else None), [name for name in names if name not in configs]


def store_of(targets: list[str]) -> str | None:
    """The store in an artifact's address: what stands before kind and fingerprint. None where there is nothing."""
    first = targets[0].rstrip("/") if targets else ""
    return first.rsplit("/", 2)[0] if first.count("/") >= 2 else None


def print_json(value: Any) -> None:
    """Print one JSON value on standard output."""
    print(json.dumps(value, indent=1, ensure_ascii=False))
