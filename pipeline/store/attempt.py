"""Attempts: what a stage has finished of an artifact that is not committed yet, kept so that a kill costs little.

Every writer has an attempt of its own under `<kind>/<fingerprint>.progress/.attempts/`, so that two writers of one
artifact never mix. An attempt lives as long as the lease under which it was begun: the artifact's, or where this
process does not hold that one, a lease of the attempt's own. A new attempt takes over the finished shards and the
records of those that no longer live.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pipeline.store.artifact import is_shard
from pipeline.store.integrity import content_reason
from pipeline.store.lease import Lease, held_token, live_holder
from pipeline.store.manifest import FileEntry, plain
from pipeline.store.objects import Objects, StoredObject


@dataclass(frozen=True)
class Finished:
    """A data file that an attempt has put in its place."""

    entry: FileEntry
    tag: str  # of the stored file when it was written
    columns: dict[str, str]  # of a table

    def to_dict(self) -> dict[str, Any]:
        """Plain fields, for JSON."""
        return {"entry": self.entry.model_dump(mode="json"), "tag": self.tag, "columns": self.columns}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Finished:
        """Read what `to_dict` wrote."""
        return cls(FileEntry.model_validate(raw["entry"]), str(raw["tag"]), dict(raw["columns"]))


@dataclass(frozen=True)
class Attempt:
    """What one writer has finished so far. Plain data and an address: picklable, usable from every node."""

    objects: Objects
    artifact: str  # "kind/fingerprint"
    id: str

    @property
    def folder(self) -> str:
        """Where it keeps what it knows of itself, relative to the store."""
        return f"{attempts_folder(self.artifact)}/{self.id}"

    def exists(self) -> bool:
        """Whether it was begun in this store, and not deleted since."""
        return self.objects.get(self._marker_path) is not None

    def is_live(self) -> bool:
        """Whether somebody may still be writing it."""
        marker = self._marker()
        holder = live_holder(self.objects, str(marker.get("under", self.artifact)))
        return holder is not None and holder.token == marker.get("lease")

    def is_ours(self) -> bool:
        """Whether it was begun under the artifact's lease that this process holds: then it is ours to continue."""
        token = held_token(self.objects, self.artifact)
        return bool(token) and self._marker().get("lease") == token

    def own_lease(self) -> Lease:
        """The lease that it lives under when nobody leases the artifact as a whole."""
        return Lease(self.objects, f"{self.artifact}.{self.id}")

    def record_file(self, finished: Finished) -> None:
        """Keep the entry of a data file that is in its place."""
        self._put(f"files/{finished.entry.name}.json", finished.to_dict())

    def record(self, key: str, value: dict[str, Any]) -> None:
        """Keep a small JSON value of the stage's; the same key again replaces it."""
        self._put(f"records/{safe_name(key)}.json", {"key": key, "value": plain(value, key)})

    def shard(self, name: str) -> Finished | None:
        """A shard that this attempt has finished or taken over; None when it has not."""
        data = self.objects.get(f"{self.folder}/files/{name}.json")
        own = _parse([data]) if data else []
        return Finished.from_dict(own[0]) if own else self.adopted()[0].get(name)

    def files(self) -> dict[str, Finished]:
        """All finished files by logical name."""
        own = [Finished.from_dict(raw) for raw in self._all("files")]
        return {**self.adopted()[0], **{finished.entry.name: finished for finished in own}}

    def records(self) -> dict[str, dict[str, Any]]:
        """All records by key, those that were taken over included."""
        return {**self.adopted()[1], **{raw["key"]: raw["value"] for raw in self._all("records")}}

    def adopted(self) -> tuple[dict[str, Finished], dict[str, dict[str, Any]]]:
        """(files, records) taken over from dead attempts."""
        key = (self.objects.address, self.id)
        if key not in _ADOPTED:  # written once, before the attempt is handed out
            for raw in _parse([self.objects.get(f"{self.folder}/adopted.json")]):
                files = [Finished.from_dict(item) for item in raw["files"]]
                _ADOPTED[key] = ({finished.entry.name: finished for finished in files}, raw["records"])
        return _ADOPTED.get(key, ({}, {}))

    def delete(self) -> None:
        """Delete what it knows of itself; the data files that it has put in place stay."""
        self.objects.delete_folder(self.folder)

    @property
    def _marker_path(self) -> str:
        return f"{self.folder}/attempt.json"

    def _marker(self) -> dict[str, Any]:
        """What `begin` wrote before anything else; empty when it cannot be read."""
        return next(iter(_parse([self.objects.get(self._marker_path)])), {})

    def _put(self, name: str, value: dict[str, Any]) -> None:
        self.objects.put(f"{self.folder}/{name}", json.dumps(value).encode(), durable=False)

    def _all(self, what: str) -> list[dict[str, Any]]:
        paths = [found.path for found in self.objects.walk(f"{self.folder}/{what}") if found.path.endswith(".json")]
        if self.objects.folder is not None:
            return _parse(self.objects.get(path) for path in paths)
        with ThreadPoolExecutor(16) as pool:
            return _parse(pool.map(self.objects.get, paths))


_ADOPTED: dict[tuple[str, str], tuple[dict[str, Finished], dict[str, dict[str, Any]]]] = {}


def attempts_folder(artifact: str) -> str:
    """Where the attempts of an artifact are, relative to the store."""
    return f"{artifact}.progress/.attempts"


def begin(objects: Objects, artifact: str) -> tuple[Attempt, Lease | None]:
    """A new attempt that continues what dead ones have finished, and takes their place.

    Returns:
        The attempt, and the lease that it lives under, to be released when its writer is done. No lease when this
        process holds the artifact's own.
    """
    others = [Attempt(objects, artifact, name) for name in objects.folders(attempts_folder(artifact))]
    # One without a marker is being made at this moment.
    dead = [other for other in others if other.exists() and (other.is_ours() or not other.is_live())]
    attempt = Attempt(objects, artifact, f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}")
    lease = None
    token = held_token(objects, artifact)
    if not token:
        lease = attempt.own_lease()
        lease.acquire()
        token = held_token(objects, lease.artifact)
    under = lease.artifact if lease is not None else artifact
    # Before anything else is written: without the marker everybody takes the attempt for dead.
    attempt._put("attempt.json", {"lease": token, "under": under, "since": time.time()})
    files: dict[str, Finished] = {}
    records: dict[str, dict[str, Any]] = {}
    for other in sorted(dead, key=lambda other: other.id):  # by age, so that the youngest one's files are kept
        files.update(other.files())
        records.update(other.records())
    shards = _intact(objects, artifact, [file for name, file in files.items() if is_shard(name)]) if files else []
    adopted = {"files": [shard.to_dict() for shard in shards], "records": records}
    attempt._put("adopted.json", adopted)
    for other in dead:
        other.delete()
    return attempt, lease


def live_attempts(objects: Objects, artifact: str, besides: str = "") -> list[Attempt]:
    """Attempts of an artifact that somebody may still be writing, without the one whose id is `besides`."""
    names = [name for name in objects.folders(attempts_folder(artifact)) if name != besides]
    return [found for name in names if (found := Attempt(objects, artifact, name)).is_live()]


def _intact(objects: Objects, artifact: str, shards: list[Finished]) -> list[Finished]:
    """The shards whose stored file is there and unchanged. A file is read only when its tag is another one."""
    listing = {found.path: found for found in objects.walk(artifact)}
    return [shard for shard in shards if not stored_reason(objects, artifact, shard, listing)]


def stored_reason(objects: Objects, artifact: str, finished: Finished, listing: dict[str, StoredObject]) -> str:
    """Why a finished file is not what its writer put in its place, or ""."""
    path = f"{artifact}/{finished.entry.stored}"
    found = listing.get(path)
    if found is None:
        return "it is missing"
    if found.tag == finished.tag:
        return ""
    return content_reason(objects, path, finished.entry)


def safe_name(key: str) -> str:
    """A file name for any text: the text itself where it can be one, else a readable start and the text's hash."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", key):
        return key
    return re.sub(r"[^A-Za-z0-9_-]", "_", key)[:60] + "-" + hashlib.sha256(key.encode()).hexdigest()[:12]


def _parse(blobs: Iterable[bytes | None]) -> list[dict[str, Any]]:
    """The JSON objects among `blobs`. A file that a power cut left unfinished counts as never written."""
    found = []
    for data in blobs:
        try:
            raw = json.loads(data) if data else None
        except ValueError:
            continue
        if isinstance(raw, dict):
            found.append(raw)
    return found
