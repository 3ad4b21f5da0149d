"""The artifact store: begin, write and commit an artifact; find, check and verify it; discard it, collect garbage.

    <address>/<kind>/<fingerprint>/            data files, and manifest.json: written last, in one atomic step
    <address>/<kind>/<fingerprint>.progress/   what survives a kill while the artifact is computed
    <address>/.tessera/                        leases, memos, records, scratch: nothing that an artifact needs

Without a valid manifest there is no artifact. A crash at any moment leaves a whole artifact, or garbage that nobody
takes for one.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

from pipeline.errors import ArtifactDamaged, StoreError
from pipeline.progress import ProgressCallback
from pipeline.store import attempt as attempts
from pipeline.store import garbage, integrity
from pipeline.store.address import mask
from pipeline.store.artifact import Artifact, Damage, load
from pipeline.store.garbage import Removed
from pipeline.store.lease import Holder, Lease, held_token, live_holder
from pipeline.store.local_cache import cache_folder
from pipeline.store.manifest import FileEntry, Manifest
from pipeline.store.objects import Conflict, Objects
from pipeline.store.records import RECORDS, read_record, write_record
from pipeline.store.sealed import SealBroken, unseal
from pipeline.store.writer import ArtifactWriter

__all__ = [
    "Artifact",
    "ArtifactStore",
    "ArtifactWriter",
    "Damage",
    "FileEntry",
    "Lease",
    "Manifest",
    "Objects",
    "Removed",
    "cache_folder",
    "mask",
]


class ArtifactStore:
    """All artifacts at one address: a folder, `file://`, `s3://bucket/prefix`, `gs://` or `az://`.

    Can be pickled. Opening it reads and writes nothing; a local folder is made by the first write. Every failure is a
    StoreError.
    """

    def __init__(self, address: str | os.PathLike[str]) -> None:
        self.objects = Objects(os.fspath(address))
        self.address = self.objects.address

    def __repr__(self) -> str:
        return f"ArtifactStore({self.address!r})"

    def find(self, kind: str, fingerprint: str) -> Artifact | None:
        """The committed artifact, or None.

        Raises:
            ArtifactDamaged: its manifest is broken.
        """
        _require_names(kind, fingerprint)
        return load(self.objects, kind, fingerprint)

    def check(self, artifact: Artifact) -> list[Damage]:
        """Damaged files, by their sizes, and by the content of files that were touched since they were last read."""
        return integrity.check(artifact)

    def verify(self, artifact: Artifact, report_progress: ProgressCallback | None = None) -> list[Damage]:
        """Damaged files, by reading every byte."""
        return integrity.verify(artifact, report_progress)

    def artifacts(self) -> Iterator[Artifact]:
        """Every artifact with a valid manifest, by kind and fingerprint."""
        for kind, fingerprint in self._folders():
            try:
                artifact = load(self.objects, kind, fingerprint)
            except ArtifactDamaged:
                continue  # `damaged` lists it
            if artifact is not None:
                yield artifact

    def damaged(self) -> Iterator[Damage]:
        """Folders whose manifest itself is broken."""
        for kind, fingerprint in self._folders():
            try:
                load(self.objects, kind, fingerprint)
            except ArtifactDamaged as error:
                yield Damage(error.artifact, error.file, error.reason)

    def begin(self, kind: str, fingerprint: str, whole: str = "") -> ArtifactWriter:
        """A writer that continues what dead attempts have finished.

        Take the artifact's lease first where nobody else should write it at the same time.

        Args:
            kind: of the artifact.
            fingerprint: of the artifact.
            whole: of a stage that stops early, the fingerprint that it has without the stop: they share a
                `progress_folder`, for which `whole` should be leased too.
        """
        _require_names(kind, fingerprint)
        return ArtifactWriter(*attempts.begin(self.objects, f"{kind}/{fingerprint}"), whole)

    def discard(self, kind: str, fingerprint: str) -> None:
        """Delete an artifact and its unfinished remains, the manifest first: without it nobody reads the rest.

        Raises:
            StoreError: another process holds its lease.
        """
        _require_names(kind, fingerprint)
        name = f"{kind}/{fingerprint}"
        holder = live_holder(self.objects, name)
        if holder is not None and holder.token != held_token(self.objects, name):
            raise StoreError(f"{name} cannot be deleted: {holder} is computing it (wait for it, or end it)")
        garbage.delete_artifact(self.objects, name)

    def gc(
        self,
        unneeded: Mapping[tuple[str, str], str] | None = None,
        *,
        older_than: timedelta,
        dry_run: bool = False,
    ) -> list[Removed]:
        """Remove what no artifact needs and nobody has touched for a while. What is being written or read stays.

        Args:
            unneeded: (kind, fingerprint) of artifacts to remove too, each with the reason (see uses.py).
            older_than: what was touched or used more recently stays.
            dry_run: only list what would go.
        """
        return garbage.collect(self.objects, self._folders(), unneeded or {}, older_than=older_than, dry_run=dry_run)

    def read_record(self, name: str) -> dict[str, Any] | None:
        """A small JSON value that the store keeps for itself, or None; one that cannot be read counts as not there."""
        return read_record(self.objects, name)

    def write_record(self, name: str, value: dict[str, Any]) -> None:
        """Replace a record in one atomic step."""
        write_record(self.objects, name, value)

    def damaged_records(self) -> Iterator[Damage]:
        """Records and memos that cannot be read. They are made anew; no artifact needs them."""
        for folder in (RECORDS, integrity.MEMOS):
            for found in self.objects.walk(folder):
                try:
                    unseal(self.objects.get(found.path) or b"")
                except SealBroken as error:
                    yield Damage(".tessera", found.path.removeprefix(".tessera/"), str(error))

    def lease(self, kind: str, fingerprint: str, waiting: Callable[[Holder], None] | None = None) -> Lease:
        """The right to compute an artifact: `with store.lease(kind, fingerprint, waiting=...):`.

        `waiting` is called with the process that is waited for.
        """
        _require_names(kind, fingerprint)
        return Lease(self.objects, f"{kind}/{fingerprint}", waiting)

    def free_bytes(self) -> int | None:
        """Free space on the store's disk; None for a bucket."""
        if self.objects.folder is None:
            return None
        folder = self.objects.folder
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def probe_writable(self) -> None:
        """Write a small file, read it, try to create it a second time (which must fail), and delete it.

        Raises:
            StoreError: one of these does not work as it should.
        """
        path = f".tessera/probe-{uuid.uuid4().hex[:12]}"
        self.objects.put(path, b"tessera", create=True)
        try:
            if self.objects.get(path) != b"tessera":
                raise StoreError(f"store {self.address}: what was written reads back as something else")
            try:
                self.objects.put(path, b"twice", create=True)
            except Conflict:
                return
            raise StoreError(
                f"store {self.address}: the server overwrites an object that was to be created "
                "(two runs could mix: use a server that supports If-None-Match)"
            )
        finally:
            self.objects.delete([path])

    def _folders(self) -> Iterator[tuple[str, str]]:
        """(kind, fingerprint) of every folder in an artifact's place, committed or not."""
        for kind in self.objects.folders():
            if re.fullmatch(_NAME, kind):
                names = {name.removesuffix(".progress") for name in self.objects.folders(kind)}
                yield from ((kind, name) for name in sorted(names) if re.fullmatch(_NAME, name))


_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"


def _require_names(kind: str, fingerprint: str) -> None:
    for name in (kind, fingerprint):
        if not re.fullmatch(_NAME, name):
            raise ValueError(f"{name!r} cannot name an artifact's folder (letters, digits, _ and -)")
