"""Classes that are found by name: what packages register under an entry-point group, and classes by their path.

Stage types are in the group `tessera.stages`; named variants of settings (methods) in the group that their base class
names. A class is imported only when a pipeline uses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pkgutil import resolve_name
from typing import Any

from pipeline.errors import UsageError
from pipeline.stage import Settings, Stage, arms

STAGES = "tessera.stages"


def names(group: str) -> list[str]:
    """The names that are registered in a group, sorted."""
    return sorted(_entries(group))


def load(group: str, name: str) -> Any:
    """The class that is registered under `name`.

    Raises:
        KeyError: the name is not registered.
        UsageError: the class cannot be imported.
    """
    entry = _entries(group)[name]
    try:
        return entry.load()
    except Exception as error:  # a module of somebody else's package may fail in any way
        package = entry.dist.name if entry.dist else "its package"
        reason = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise UsageError(f"{name!r} ({entry.value}, from {package}) cannot be imported: {reason}") from error


def imported(path: str) -> Any:
    """The class that `path` names as "module:Class": how settings name what they build without importing it.

    Raises:
        UsageError: `path` has another form, its module cannot be imported, or the module has no such class.
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise UsageError(f"{path!r} does not name a class (write module:Class, for example package.module:Name)")
    try:
        return resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"{path!r} cannot be imported: {error} (correct the path, or install the package that it needs)"
        ) from error


def stage_class(uses: str) -> type[Stage[Any]] | None:
    """The stage type that an artifact's manifest names; None where it is not installed or cannot be imported."""
    try:
        found: type[Stage[Any]] = load(STAGES, uses)
    except (KeyError, UsageError):
        return None
    return found


def stage_classes() -> Mapping[str, type[Stage[Any]]]:
    """Every installed stage type, imported."""
    return {name: load(STAGES, name) for name in names(STAGES)}


def variant(annotation: Any, value: Any) -> type[Settings] | None:
    """The settings class for the mapping `value` under a field with this annotation; None where it cannot be told."""
    for arm, _ in arms(annotation):
        if not (isinstance(arm, type) and issubclass(arm, Settings)):
            continue
        if arm.variant_group is None:
            return arm
        name = value.get("name") if isinstance(value, dict) else None
        if isinstance(name, str) and name in names(arm.variant_group):
            loaded: type[Settings] = load(arm.variant_group, name)
            return loaded
    return None


@cache
def _entries(group: str) -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=group):
        other = found.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise UsageError(f"two packages register {entry.name!r} in {group}: {other.value} and {entry.value}")
    return found
