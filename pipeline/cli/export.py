"""`tessera export`: the files of an artifact that are meant for use elsewhere, copied out of the store."""

from __future__ import annotations

import fnmatch
import shutil
import tempfile
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
    require_empty(Path(to))
    catalogue = open_catalogue(config, overrides, store or store_of(targets))
    node = catalogue.pipeline.stages.get(targets[0]) if catalogue.pipeline is not None else None
    if node is not None:
        _require_exports(targets[0], node.uses)
    artifact = catalogue.one(targets[0])
    copied = copy_out(artifact, Path(to))
    if registry.stage_class(artifact.manifest.uses) is None:
        typer.echo(f"stage type '{artifact.manifest.uses}' is not installed here: all files are copied", err=True)
    if as_json:
        print_json({"artifact": artifact.address, "files": [str(path) for path in copied]})
    else:
        typer.echo("\n".join(str(path) for path in copied))


def require_empty(target: Path) -> None:
    """Raises UsageError for a folder that holds something, and for a path that is no folder."""
    if target.is_dir():
        held = sorted(path.name for path in target.iterdir())
        if held:
            names = ", ".join(held[:3]) + (f" and {len(held) - 3} more" if len(held) > 3 else "")
            raise UsageError(f"--to {target}: the folder is not empty, it holds {names} (name another, or empty it)")
    elif target.exists():
        raise UsageError(f"--to {target}: this is a file (name a folder)")


def copy_out(artifact: Artifact, target: Path) -> list[Path]:
    """Copy what an artifact's stage type offers for export into the folder `target`, under the files' plain names.

    The type may add files of its own, as code that the others need. All files are copied where the type is not
    installed here. Each is checked against the manifest. On a failure nothing is left.

    Raises:
        UsageError: the type exports nothing, the artifact cannot be used elsewhere, or the folder is not empty.
    """
    from pipeline.config import registry

    require_empty(target)
    names = _exported(artifact)
    found = {name: artifact.local(name) for name in names}
    made_by = registry.stage_class(artifact.manifest.uses)
    try:
        fresh = not target.exists()
        target.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".export-", dir=target))
    except OSError as error:
        raise UsageError(f"--to {target}: cannot be written: {error.strerror} (name another folder)") from error
    try:
        for name, path in found.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, staging / name)
        added = [] if made_by is None else made_by.complete_export(artifact, staging)
        written = [target / name for name in [*names, *(str(path.relative_to(staging)) for path in added)]]
        for path in staging.iterdir():
            path.rename(target / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if fresh and not any(target.iterdir()):
            target.rmdir()
    return written


def _exported(artifact: Artifact) -> list[str]:
    """Logical names in the order of the type's patterns; a plain name counts also where the artifact lacks it."""
    from pipeline.config import registry

    held = [entry.name for entry in artifact.manifest.files]
    made_by = registry.stage_class(artifact.manifest.uses)
    if made_by is None:
        return held
    _require_exports(artifact.name, artifact.manifest.uses)
    found: dict[str, None] = {}
    for pattern in made_by.exports:
        found |= dict.fromkeys(fnmatch.filter(held, pattern) or ([] if "*" in pattern else [pattern]))
    return list(found)


def _require_exports(name: str, uses: str) -> None:
    """Raises UsageError where stages of this type export nothing; `name` is what the user called the artifact."""
    from pipeline.config import registry

    made_by = registry.stage_class(uses)
    if made_by is not None and not made_by.exports:
        offering = [other for other, found in registry.stage_classes().items() if found.exports]
        raise UsageError(
            f"{name}: a stage of type {uses} exports nothing "
            f"(name the artifact of a stage that uses {' or '.join(offering)})"
        )
