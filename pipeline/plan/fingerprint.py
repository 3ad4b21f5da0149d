"""What an artifact depends on: the identity of a stage, and the hash over it that names the artifact.

Pure functions. history.py keeps the identity beside the fingerprint, so that a plan can say what has changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypedDict

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from pipeline.stage import Stage, edges, sources, stop_points, unfingerprinted

FORMAT = 1  # raise it when the meaning of an identity changes: then every artifact is computed again
HEX_DIGITS = 24


class Identity(TypedDict):
    """Everything that changes a stage's artifact, and nothing else."""

    format: int
    uses: str
    version: int
    settings: dict[str, Any]  # defaults included; inputs, sources and unfingerprinted fields taken out
    sources: dict[str, str]  # dotted field path -> digest of the content
    inputs: dict[str, str]  # dotted field path -> fingerprint
    packages: dict[str, str]  # distribution -> version, of those the stage names


def settings(config: BaseModel) -> dict[str, Any]:
    """All of a config in JSON's types, with YAML's names; a subclass in a field keeps its own fields."""
    plain: dict[str, Any] = _plain(config.model_dump(by_alias=True, serialize_as_any=True))
    return plain


def identity(
    uses: str,
    stage: Stage[Any],
    source_digests: Mapping[str, str],
    input_fingerprints: Mapping[str, str],
    *,
    whole: bool = False,
) -> Identity:
    """The identity of a stage.

    Args:
        uses: its type's name.
        stage: with its config.
        source_digests: dotted field path -> digest, for every source.
        input_fingerprints: dotted field path -> fingerprint, for every edge.
        whole: as if it did not stop early.
    """
    config: BaseModel = stage.config
    ignored = unfingerprinted(config)

    def counts(path: str) -> bool:
        return not any(path == other or path.startswith(f"{other}.") for other in ignored)

    dumped = settings(config)
    unset = [path for path, value in stop_points(config).items() if whole or value is None]
    for path in [*ignored, *unset, *(edge.path for edge in edges(config)), *sources(config)]:
        _remove(dumped, path.split("."))
    return Identity(
        format=FORMAT,
        uses=uses,
        version=stage.version,
        settings=dumped,
        sources={path: digest for path, digest in source_digests.items() if counts(path)},
        inputs={path: name for path, name in input_fingerprints.items() if counts(path)},
        packages={name: _version(name) for name in stage.packages},
    )


def fingerprint(identity: Identity) -> str:
    """The hash over an identity: 24 hex digits, the same on every machine, whatever the order of keys."""
    return hashlib.sha256(_canonical(identity).encode("ascii")).hexdigest()[:HEX_DIGITS]


def _plain(value: Any) -> Any:
    """The value in JSON's types, with sets sorted: pydantic's order of a set differs from process to process."""
    if isinstance(value, dict):
        return {str(to_jsonable_python(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=_canonical)
    return to_jsonable_python(value, inf_nan_mode="constants")


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _remove(dumped: Any, path: list[str]) -> None:
    """Take a value out. In a list null takes its place, so that the paths of the other items stay what they are."""
    *parents, last = path
    for key in parents:
        if isinstance(dumped, list):
            dumped = dumped[int(key)]
        elif isinstance(dumped, dict) and key in dumped:
            dumped = dumped[key]
        else:  # inside something that was taken out whole
            return
    if isinstance(dumped, list):
        dumped[int(last)] = None
    elif isinstance(dumped, dict):
        dumped.pop(last, None)
