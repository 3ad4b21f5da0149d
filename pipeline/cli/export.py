"""`tessera export`: the files of an artifact that are meant for use elsewhere, copied out of the store."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import Json, Overrides, Store, config_and_targets, open_catalogue, print_json, store_of
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact


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
    from pipeline.config import registry

    config, targets = config_and_targets(names)
    if len(targets) != 1:
        raise UsageError("export takes one artifact or stage, and the pipeline file of the stage")
    artifact = open_catalogue(config, overrides, store or store_of(targets)).one(targets[0])
    copied = copy_out(artifact, Path(to))
    if registry.stage_class(artifact.manifest.uses) is None:
        typer.echo(f"stage type '{artifact.manifest.uses}' is not installed here: all files are copied", err=True)
    if as_json:
        print_json({"artifact": artifact.address, "files": [str(path) for path in copied]})
    else:
        typer.echo("\n".join(str(path) for path in copied))


def copy_out(artifact: Artifact, target: Path) -> list[Path]:
    """Copy what an artifact's stage type offers for export into the folder `target`, under the files' plain names.

    All files are copied where the type is not installed here. Each is checked against the manifest.

    Raises:
        UsageError: the type exports nothing, or a file of that name is there already.
    """
    names = _exported(artifact)
    if taken := [name for name in names if (target / name).exists()]:
        raise UsageError(f"{target} holds {', '.join(taken)} already (name another folder, or remove them)")
    copied = []
    for name in names:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(artifact.read(name))
        copied.append(path)
    return copied


def _exported(artifact: Artifact) -> list[str]:
    """Logical names in the order of the type's patterns; a plain name counts also where the artifact lacks it."""
    from pipeline.config import registry

    held = [entry.name for entry in artifact.manifest.files]
    made_by = registry.stage_class(artifact.manifest.uses)
    if made_by is None:
        return held
    if not made_by.exports:
        offering = [name for name, found in registry.stage_classes().items() if found.exports]
        raise UsageError(
            f"{artifact.name}: a stage of type {artifact.manifest.uses} exports nothing "
            f"(name the artifact of a stage that uses {' or '.join(offering)})"
        )
    found: dict[str, None] = {}
    for pattern in made_by.exports:
        found |= dict.fromkeys(fnmatch.filter(held, pattern) or ([] if "*" in pattern else [pattern]))
    return list(found)
