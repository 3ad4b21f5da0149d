"""What a source holds, as a digest of its content: the part of a fingerprint that comes from outside the store.

The store remembers which listing (paths, sizes, times or etags) led to which digest. So a plan lists a source without
opening a file, and after a change only the files that look different are read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import SourceError, StoreError
from pipeline.progress import ProgressCallback
from pipeline.store.address import mask
from pipeline.store.objects import Objects, file_tag

if TYPE_CHECKING:
    from pipeline.store.store import ArtifactStore

ATTEMPTS = 3  # how often a source that changes while it is read is read again


@dataclass(frozen=True)
class SourceDigest:
    """A source's identity and size."""

    digest: str  # sha256 over the sorted (relative path, sha256 of content)
    files: int
    bytes: int


def source_digest(
    address: str, store: ArtifactStore, report_progress: ProgressCallback | None = None, *, remember: bool = True
) -> SourceDigest:
    """The digest of a file, a folder or a bucket prefix.

    Names that begin with a dot, or are not UTF-8, are not part of a source.

    The digest depends on the files' relative paths and contents alone: a copy elsewhere has the same one, and so
    has a single file under another name.

    Args:
        address: a path, or an address of a bucket.
        store: keeps what was found.
        report_progress: called for every file that is read.
        remember: write what was found into the store.

    Raises:
        SourceError: nothing is there, there is no file in it, or it changes while it is read.
    """
    source = _open(address)
    name = f"source-{hashlib.sha256(source.address.encode()).hexdigest()[:24]}"
    listing = source.look()
    memo = store.read_record(name) or {}
    if memo.get("listing") == _listing_digest(listing):
        return SourceDigest(memo["digest"], memo["files"], memo["bytes"])
    read_before = {path: tuple(entry) for path, entry in ((store.read_record(f"{name}-files") or {}).items())}
    contents = {path: digest for path, (tag, digest) in read_before.items() if path in listing}
    tags = {path: tag for path, (tag, _) in read_before.items()}
    for _ in range(ATTEMPTS):
        listing = source.settled()
        stale = [path for path, entry in listing.items() if tags.get(path) != entry.tag]
        contents |= _hash_all(source, stale, report_progress)
        tags |= {path: listing[path].tag for path in stale}
        if source.look() == listing:
            break
    else:
        raise SourceError(f"source {mask(address)} keeps changing while it is read (wait until it is complete)")
    digest = hashlib.sha256()
    for path in sorted(listing):
        digest.update(f"{path}\0{contents[path]}\n".encode())
    found = SourceDigest(digest.hexdigest(), len(listing), sum(entry.size for entry in listing.values()))
    if not remember:
        return found
    with contextlib.suppress(StoreError):  # without these records the next plan reads the source again, nothing else
        # The long record first: when the short one is found, the long one is there too.
        store.write_record(f"{name}-files", {path: [tags[path], contents[path]] for path in listing})
        short = {"digest": found.digest, "files": found.files, "bytes": found.bytes}
        store.write_record(name, {"address": source.address, "listing": _listing_digest(listing), **short})
    return found


@dataclass(frozen=True)
class _Entry:
    size: int
    tag: str  # differs when the content may differ


class _Local:
    """A file or folder on this machine. Links are followed, as a stage would follow them."""

    def __init__(self, address: str, path: Path) -> None:
        self.written, self.path = address, path
        self.address = str(path)
        self.newest_ns = 0

    def look(self) -> dict[str, _Entry]:
        self.newest_ns = 0
        try:
            if not self.path.is_dir():
                return {"": self._entry(os.stat(self.path))}
            found = dict(self._walk(str(self.path), "", ()))
        except FileNotFoundError as error:
            if not self.path.exists():
                raise SourceError(f"nothing is at {self.written}{_looked_in(self.written)}") from error
            raise SourceError(f"cannot read {error.filename}: it is not there (a link that leads nowhere?)") from error
        except OSError as error:
            raise SourceError(f"cannot read {error.filename or self.written}: {error.strerror}") from error
        if not found:
            raise SourceError(
                f"there is no file in {self.written} (names that begin with a dot or are not UTF-8 do not count)"
            )
        return found

    def settled(self) -> dict[str, _Entry]:
        """The listing, made after the clock has passed the newest time in it: a later change gets another time."""
        listing = self.look()
        coarse = self.newest_ns % 1_000_000_000 == 0  # a file system that keeps whole seconds
        wait = self.newest_ns / 1e9 + (2.0 if coarse else 0.05) - time.time()
        if 0 < wait <= 2.0:  # a time in the future comes from another clock: waiting would not help
            time.sleep(wait)
            listing = self.look()
        return listing

    def digest(self, path: str) -> str:
        with open(self.path / path if path else self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _walk(self, folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, _Entry]]:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if any("\udc80" <= letter <= "\udcff" for letter in entry.name):  # Python's form of other bytes
                    continue  # no stage can read it by its name; `ingest` says which ones it left out
                if entry.is_dir():
                    stat = entry.stat()
                    if (stat.st_dev, stat.st_ino) not in above:  # following a link to a folder above would not end
                        within = (*above, (stat.st_dev, stat.st_ino))
                        yield from self._walk(entry.path, f"{prefix}{entry.name}/", within)
                elif entry.is_file() or not os.path.exists(entry.path):  # no pipes, no sockets
                    yield f"{prefix}{entry.name}", self._entry(entry.stat())

    def _entry(self, stat: os.stat_result) -> _Entry:
        self.newest_ns = max(self.newest_ns, stat.st_ctime_ns)
        return _Entry(stat.st_size, file_tag(stat))


class _Bucket:
    """An object in a bucket, or everything under a prefix. Every write changes an etag, so nothing has to settle."""

    def __init__(self, objects: Objects) -> None:
        self.objects, self.address = objects, objects.address

    def look(self) -> dict[str, _Entry]:
        try:
            found = {f.path: _Entry(f.size, f.tag) for f in self.objects.walk() if not _hidden(f.path)}
            if not found and (single := self._single()):
                found = {"": single}
        except StoreError as error:
            raise SourceError(f"cannot read source {error}") from error
        if not found:
            raise SourceError(f"nothing is at {self.address} (names that begin with a dot do not count)")
        return found

    settled = look

    def digest(self, path: str) -> str:
        digest = hashlib.sha256()
        try:
            objects, name = (self.objects, path) if path else self._parent()
            for block in objects.stream(name):
                digest.update(block)
        except StoreError as error:
            raise SourceError(f"cannot read source {error}") from error
        return digest.hexdigest()

    def _parent(self) -> tuple[Objects, str]:
        parent, _, name = self.address.rpartition("/")
        return Objects(parent), name

    def _single(self) -> _Entry | None:
        if self.address.count("/") < 3:  # the bucket itself
            return None
        objects, name = self._parent()
        found = objects.head(name)
        return _Entry(found.size, found.tag) if found else None


def _open(address: str) -> _Local | _Bucket:
    try:
        objects = Objects(address)
    except StoreError as error:
        raise SourceError(
            str(error).replace("store", "source", 1).replace("no kind of store", "no kind of source")
        ) from error
    return _Local(address, objects.folder) if objects.folder is not None else _Bucket(objects)


def _hash_all(source: _Local | _Bucket, paths: list[str], report_progress: ProgressCallback | None) -> dict[str, str]:
    """Digests by path, of files that are read in parallel; "" for a file that was deleted meanwhile."""

    def read(path: str) -> tuple[str, str]:
        try:
            return path, source.digest(path)
        except FileNotFoundError:
            return path, ""
        except OSError as error:
            raise SourceError(f"cannot read {error.filename or path}: {error.strerror}") from error

    if not paths:
        return {}
    found: dict[str, str] = {}
    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
        for path, digest in pool.map(read, paths):
            found[path] = digest
            if report_progress is not None:
                report_progress(len(found), len(paths), "files")
    return found


def _listing_digest(listing: dict[str, _Entry]) -> str:
    digest = hashlib.sha256()
    for path in sorted(listing):
        entry = listing[path]
        digest.update(f"{path}\0{entry.size}\0{entry.tag}\n".encode())
    return digest.hexdigest()


def _hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _looked_in(written: str) -> str:
    return "" if os.path.isabs(written) or "://" in written else f" (looked in {os.getcwd()})"


def as_json(found: SourceDigest, address: str) -> dict[str, Any]:
    """What a plan and a manifest keep of a source."""
    return {"address": address, "digest": found.digest, "files": found.files, "bytes": found.bytes}
