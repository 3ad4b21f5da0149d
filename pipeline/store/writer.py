"""Writes one artifact: its files, each named after its content, then the manifest, in one atomic step."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pipeline.errors import StoreError
from pipeline.store import attempt as attempts
from pipeline.store.artifact import Artifact, is_shard, load
from pipeline.store.attempt import Attempt, Finished
from pipeline.store.failures import explain
from pipeline.store.integrity import write_memo
from pipeline.store.lease import Lease
from pipeline.store.local_cache import cache_error, cache_folder, local_copy
from pipeline.store.manifest import MANIFEST, FileEntry, Manifest, plain
from pipeline.store.objects import GRAIN_NS, Conflict, Objects, StoredObject
from pipeline.store.owner import this_process

if TYPE_CHECKING:
    import pyarrow as pa

ROW_GROUP_BYTES = 64 << 20  # a reader that streams holds one row group in memory
SCRATCH_MARKER = ".attempt.json"
_CHECKED: set[tuple[str, str]] = set()  # attempts that this process has seen in the store


class ArtifactWriter:
    """Where an artifact is written. Can be pickled: Ray tasks on any node that reaches the store write through it.

    Putting the same name again replaces the earlier file. Nothing can be read before `commit`.
    """

    def __init__(self, attempt: Attempt, lease: Lease | None = None, whole: str = "") -> None:
        self._attempt = attempt
        self._lease = lease  # the attempt's own, in the process that began it
        self._objects = attempt.objects
        self.kind, self.fingerprint = attempt.artifact.split("/")
        self.whole = whole or self.fingerprint  # of a stage that stops early, its fingerprint without the stop
        self._scratch: Path | None = None

    def __reduce__(self) -> tuple[type[ArtifactWriter], tuple[Attempt, None, str]]:
        return ArtifactWriter, (self._attempt, None, self.whole)

    def __repr__(self) -> str:
        return f"ArtifactWriter({self._objects.join(self.name)!r}, attempt {self._attempt.id})"

    @property
    def name(self) -> str:
        """Kind and fingerprint with a slash between them."""
        return self._attempt.artifact

    @property
    def progress_folder(self) -> Path:
        """A local folder that survives a kill, and is deleted when the artifact is committed.

        A stage that stops early has the folder of the whole work, which stays until that is committed.
        """
        folder = local_progress_folder(self._objects, f"{self.kind}/{self.whole}")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def progress_address(self) -> str:
        """The same on storage that all nodes share, for Ray Train's `storage_path`."""
        if self._objects.folder is not None:
            return str(self.progress_folder)
        return self._objects.join(f"{self.kind}/{self.whole}.progress")

    @property
    def scratch(self) -> Path:
        """A local folder for files that nobody needs afterwards; each process has its own."""
        if self._scratch is None or not self._scratch.is_dir():
            self._scratch = _make_scratch(self._attempt)
            weakref.finalize(self, _remove_own, self._scratch, os.getpid())
        return self._scratch

    def leave(self, name: str, data: bytes) -> None:
        """Put a file at `progress_address`, for a person to look at after a failure.

        It survives the process, and is deleted when the artifact is committed.
        """
        self._objects.put(f"{self.kind}/{self.whole}.progress/{name}", data)

    def shard_done(self, index: int, suffix: str = ".parquet") -> FileEntry | None:
        """The entry of a shard that this attempt, or a dead one before it, has finished; None otherwise."""
        finished = self._attempt.shard(shard_name(index, suffix))
        return finished.entry if finished else None

    def shards(self) -> Iterator[FileEntry]:
        """The entries of the shards that are finished, in order: a stage can read what its workers wrote."""
        files = self._attempt.files()
        return (files[name].entry for name in sorted(files) if is_shard(name))

    def local(self, name: str) -> Path:
        """A local path of a finished file.

        Raises:
            KeyError: it is not finished.
            ArtifactDamaged: it was changed after it was written.
        """
        finished = self._attempt.shard(name)
        if finished is None:
            raise KeyError(name)
        return local_copy(self._objects, self.name, finished.entry)

    def put_table(self, index: int, table: pa.Table, *, meta: Mapping[str, Any] | None = None) -> FileEntry:
        """Write one shard of the artifact's table as Parquet: zstd, statistics, row groups of about 64 MiB.

        Args:
            index: the shard's number.
            table: its rows.
            meta: small values to keep with the file's entry in the manifest.
        """
        import pyarrow.parquet as pq

        self._require_attempt()
        name = shard_name(index, ".parquet")
        file = self.scratch / f"{name}.{os.urandom(4).hex()}"
        rows = max(1, min(table.num_rows, ROW_GROUP_BYTES * max(1, table.num_rows) // max(1, table.nbytes)))
        try:
            pq.write_table(
                table,
                file,
                compression="zstd",
                write_statistics=True,
                row_group_size=rows,
                # Of half floats, a dictionary triples the time and saves nothing.
                use_dictionary=not any("halffloat" in str(column) for column in table.schema.types),
            )
            size, digest = _measure(file)
        except OSError as error:
            file.unlink(missing_ok=True)
            raise self._scratch_error(error, name, table.nbytes) from error
        try:
            entry = FileEntry(
                name=name, stored=stored_name(name, digest), size=size, sha256=digest, rows=table.num_rows,
                meta=plain(meta or {}, name),
            )  # fmt: skip
            tag = self._objects.put_moved(f"{self.name}/{entry.stored}", file)
        finally:
            file.unlink(missing_ok=True)
        columns = {field.name: str(field.type) for field in table.schema}
        self._attempt.record_file(Finished(entry, tag, columns))
        return entry

    def put_file(
        self, name: str, data: bytes | Path, *, rows: int | None = None, meta: Mapping[str, Any] | None = None
    ) -> FileEntry:
        """Write one file.

        Args:
            name: its logical name, as in "curves.json" or "pictures/best.png".
            data: the content, or a local file to copy.
            rows: how many rows it holds, where it is a table.
            meta: small values to keep with the file's entry in the manifest.
        """
        self._require_attempt()
        _require_file_name(name)
        size, digest = (len(data), hashlib.sha256(data).hexdigest()) if isinstance(data, bytes) else _measure(data)
        entry = FileEntry(
            name=name,
            stored=stored_name(name, digest),
            size=size,
            sha256=digest,
            rows=rows,
            meta=plain(meta or {}, name),
        )
        tag = self._objects.put(f"{self.name}/{entry.stored}", data)
        self._attempt.record_file(Finished(entry, tag, {}))
        return entry

    def record(self, key: str, value: dict[str, Any]) -> None:
        """Keep a small JSON value that survives a kill; the same key again replaces it."""
        self._require_attempt()
        self._attempt.record(key, value)

    def records(self) -> dict[str, dict[str, Any]]:
        """All records by key, those of dead attempts included."""
        return self._attempt.records()

    def commit(self, fields: Mapping[str, Any] | None = None, *, replace: bool = False, **more: Any) -> Artifact:
        """Write the manifest, which makes the files an artifact.

        When another run has committed the same artifact meanwhile, that one is returned and the files of this writer
        are deleted.

        Args:
            fields: of the manifest: counts, metrics, config, inputs, ...
            replace: take the place of an artifact that is there already.
            more: further fields of the manifest.

        Raises:
            StoreError: a file is missing or was changed.
        """
        files = self._attempt.files()
        taken = not replace and self._objects.get(f"{self.name}/{MANIFEST}") is not None
        if taken or not self._attempt.exists():
            return self._adopt()
        listing = {found.path: found for found in self._objects.walk(self.name)}
        for finished in files.values():
            reason = attempts.stored_reason(self._objects, self.name, finished, listing)
            if reason:
                raise StoreError(
                    f"{self.name} cannot be committed: {finished.entry.stored}: {reason} (it was changed after it was "
                    "written; run the same command again: only what is missing is computed)"
                )
        manifest = self._manifest(files, {**(fields or {}), **more})
        data = manifest.to_bytes()
        try:
            self._objects.put(f"{self.name}/{MANIFEST}", data, create=not replace)
        except Conflict:
            return self._adopt()
        artifact = Artifact(self._objects, Manifest.from_bytes(data, self.kind, self.fingerprint))
        write_memo(artifact, _settled(artifact, listing))
        self._clean_up(artifact)
        return artifact

    def close(self) -> None:
        """Stop without committing; the next attempt continues what this one has finished."""
        if self._lease is not None:
            self._lease.release()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _manifest(self, files: dict[str, Finished], fields: dict[str, Any]) -> Manifest:
        unknown = set(fields) - set(Manifest.model_fields)
        if unknown:
            raise TypeError(f"a manifest has no field {', '.join(sorted(unknown))}")
        shards = sorted(name for name in files if is_shard(name))
        tables = [files[name].columns for name in shards if files[name].columns]
        for name, columns in zip(shards, tables, strict=False):
            if columns != tables[0]:
                raise StoreError(f"{self.name}: {name} has other columns than {shards[0]}: {columns}, not {tables[0]}")
        rows = [files[name].entry.rows for name in shards]
        fixed = {
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "files": [files[name].entry for name in [*shards, *sorted(set(files) - set(shards))]],
            "columns": tables[0] if tables else {},
            "rows": sum(row or 0 for row in rows) if shards else None,
            "attempt": self._attempt.id,
        }
        created = {"created": datetime.now(UTC).isoformat(timespec="seconds")}
        return Manifest.model_validate(plain({**created, **fields, **fixed}))

    def _adopt(self) -> Artifact:
        """The artifact that another run committed first.

        Raises:
            ArtifactDamaged: its manifest is broken.
            StoreError: there is none.
        """
        artifact = load(self._objects, self.kind, self.fingerprint)
        if artifact is None:
            raise StoreError(
                f"{self.name} cannot be committed: its unfinished files are gone from {self._objects.address} "
                "(deleted while it was computed: by hand, or by `tessera artifacts gc`; run the same command again)"
            )
        self._clean_up(artifact)
        return artifact

    def _clean_up(self, artifact: Artifact) -> None:
        """Remove what only this attempt needed and, when nobody else is writing, all other remains."""
        self.close()
        wanted = {entry.stored for entry in artifact.manifest.files} | {MANIFEST}
        others = attempts.live_attempts(self._objects, self.name, besides=self._attempt.id)
        if others:  # they may need a file that this attempt has put too; the last one to finish removes the rest
            self._attempt.delete()
            return
        prefix = f"{self.name}/"
        present = [found.path for found in self._objects.walk(self.name)]
        self._objects.delete([path for path in present if path.removeprefix(prefix) not in wanted])
        self._objects.delete_folder(f"{self.name}.progress")
        if self._objects.folder is None:
            shutil.rmtree(local_progress_folder(self._objects, self.name), ignore_errors=True)

    def _scratch_error(self, error: OSError, name: str, needed: int) -> StoreError:
        if self._objects.folder is None:
            return cache_error(error, needed)
        return explain(error, self._objects.address, "write", f"{self.name}/{name}", needed=needed)

    def _require_attempt(self) -> None:
        """Check, at the first write of a process, that it reaches the store in which the attempt was begun."""
        key = (self._objects.address, self._attempt.id)
        if key in _CHECKED:
            return
        if not self._attempt.exists() and load(self._objects, self.kind, self.fingerprint) is None:
            raise StoreError(
                f"{self.name} cannot be written from {this_process()}: {self._objects.address} does not hold what "
                "the driver began there (if it was deleted meanwhile, run the same command again; a local store must "
                "be a folder that all nodes share: use one, or a bucket)"
            )
        _CHECKED.add(key)


def shard_name(index: int, suffix: str = ".parquet") -> str:
    """The logical name of a shard: "part-00003.parquet"."""
    return f"part-{index:05d}{suffix}"


def stored_name(name: str, sha256: str) -> str:
    """What a file is called in the artifact's folder: its logical name with the start of its hash in it."""
    path = PurePosixPath(name)
    return str(path.with_name(f"{path.stem}.{sha256[:12]}{path.suffix}"))


def local_progress_folder(objects: Objects, artifact: str) -> Path:
    """Where `ArtifactWriter.progress_folder` is on this machine."""
    if objects.folder is not None:
        return objects.folder / f"{artifact}.progress"
    return cache_folder() / "progress" / _short_hash(objects.address) / artifact


def scratch_root(objects: Objects) -> Path:
    """Where scratch folders are: on the store's own disk, so that finished files are moved and not copied.

    For a bucket, in this machine's cache.
    """
    if objects.folder is not None:
        return objects.folder / ".tessera" / "scratch"
    return cache_folder() / "scratch" / _short_hash(objects.address)


def _make_scratch(attempt: Attempt) -> Path:
    root = scratch_root(attempt.objects)
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{attempt.id}-", dir=root))
        (folder / SCRATCH_MARKER).write_text(json.dumps({"artifact": attempt.artifact, "attempt": attempt.id}))
    except OSError as error:
        if attempt.objects.folder is None:
            raise cache_error(error) from error
        raise explain(error, str(root), "write", "a scratch folder") from error
    return folder


def scratch_attempt(objects: Objects, folder: Path) -> Attempt | None:
    """The attempt that a scratch folder belongs to; None when the folder does not say."""
    try:
        marker = json.loads((folder / SCRATCH_MARKER).read_text())
        return Attempt(objects, str(marker["artifact"]), str(marker["attempt"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _remove_own(folder: Path, pid: int) -> None:
    if os.getpid() == pid:  # not in a fork of the process that made it
        shutil.rmtree(folder, ignore_errors=True)


def _measure(file: Path) -> tuple[int, str]:
    """(bytes, sha256) of a file."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
        return opened.tell(), digest


def _settled(artifact: Artifact, listing: dict[str, StoredObject]) -> dict[str, str]:
    """The tags of the files that are old enough for their tag to be trusted."""
    tags = {}
    for entry in artifact.manifest.files:
        found = listing[f"{artifact.name}/{entry.stored}"]
        if found.changed_ns < time.time_ns() - GRAIN_NS:
            tags[entry.stored] = found.tag
    return tags


def _require_file_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*", name) or name == MANIFEST:
        raise ValueError(f"{name!r} cannot name an artifact's file (letters, digits, _ . - and / between folders)")
