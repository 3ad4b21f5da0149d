"""Records: small JSON values that the store keeps for itself, each sealed and replaced in one atomic step.

No artifact needs one. A record that cannot be read counts as not there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.store.attempt import safe_name
from pipeline.store.manifest import plain
from pipeline.store.objects import Objects
from pipeline.store.sealed import SealBroken, seal, unseal

RECORDS = ".tessera/records"


def record_path(name: str) -> str:
    """Where a record is, relative to the store; slashes in its name make folders."""
    return f"{RECORDS}/" + "/".join(safe_name(part) for part in name.split("/")) + ".json"


def read_record(objects: Objects, name: str) -> dict[str, Any] | None:
    """The value of a record, or None."""
    return _parsed(objects.get(record_path(name)))


def write_record(objects: Objects, name: str, value: Mapping[str, Any]) -> None:
    """Replace a record.

    Raises:
        StoreError: the store cannot be written.
    """
    objects.put(record_path(name), seal({"note": plain(value, name)}), durable=False)


def delete_record(objects: Objects, name: str) -> None:
    """Remove a record; harmless when it is not there."""
    objects.delete([record_path(name)])


def records_in(objects: Objects, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, value) of every record whose name begins with `folder` and a slash."""
    for found in objects.walk(f"{RECORDS}/{folder}"):
        value = _parsed(objects.get(found.path)) if found.path.endswith(".json") else None
        if value is not None:
            yield found.path.removeprefix(f"{RECORDS}/").removesuffix(".json"), value


def _parsed(data: bytes | None) -> dict[str, Any] | None:
    try:
        return dict(unseal(data)["note"]) if data else None
    except SealBroken:
        return None
