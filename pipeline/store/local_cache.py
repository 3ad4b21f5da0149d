"""What one machine keeps of a store: local paths of an artifact's files, checked against the manifest.

Files of a local store are used where they are. Files of a bucket are downloaded once for a machine and named by their
content. Each file is hashed once for a machine; all processes share the finding, and afterwards only look at the
file's size and times. The cache can be deleted at any time.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from pipeline.errors import ArtifactDamaged, StoreError
from pipeline.store.failures import room_at
from pipeline.store.manifest import FileEntry
from pipeline.store.objects import GRAIN_NS, Objects, file_tag

_SEEN: dict[tuple[str, str], str] = {}  # (path, sha256) -> tag: the files that this process knows to be right


def cache_folder() -> Path:
    """The cache's folder: `TESSERA_CACHE`, or `tessera` in the user's cache folder."""
    chosen = os.environ.get("TESSERA_CACHE")
    base = Path(chosen).expanduser() if chosen else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "tessera"
    return base.expanduser().absolute()


def local_copy(objects: Objects, artifact: str, entry: FileEntry) -> Path:
    """A local path of one file whose content is what the manifest says.

    Raises:
        ArtifactDamaged: the stored file differs from the manifest.
        StoreError: the cache cannot be written.
    """
    stored = f"{artifact}/{entry.stored}"
    suffix = PurePosixPath(entry.name).suffix
    inside = objects.folder is not None
    path = objects.folder / stored if objects.folder is not None else _cached(entry, suffix)
    if _known(path, entry):
        return path
    with _one_at_a_time(entry.sha256):
        if _known(path, entry):  # another worker of this machine was faster
            return path
        if not inside and not path.exists():
            _download(objects, stored, path, entry.size)
        tag = _tag(path)
        reason = differs(path, entry)
        if reason and not inside:  # the copy may be damaged while the store is not
            _download(objects, stored, path, entry.size)
            tag = _tag(path)
            reason = differs(path, entry)
        if reason:
            if not inside:
                path.unlink(missing_ok=True)
            raise ArtifactDamaged(artifact, entry.stored, reason)
        _remember(path, entry, tag)
    return path


def differs(path: Path, entry: FileEntry) -> str:
    """Why a local file is not what the manifest says, or "". Reads all of it."""
    try:
        size = path.stat().st_size
        if size != entry.size:
            return wrong_size(size, entry)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return "it is missing"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return "" if digest == entry.sha256 else WRONG_CONTENT


WRONG_CONTENT = "its content differs from its checksum"


def wrong_size(size: int, entry: FileEntry) -> str:
    """The reason for a damage when a file has another size than its entry."""
    return f"it has {size} bytes, the manifest says {entry.size}"


def _cached(entry: FileEntry, suffix: str) -> Path:
    return cache_folder() / "files" / entry.sha256[:2] / f"{entry.sha256}{suffix}"


def _memo_path(path: Path, entry: FileEntry) -> Path:
    """Where this machine keeps the tag with which a file was found to be right."""
    key = hashlib.sha256(f"{path}\n{entry.sha256}".encode()).hexdigest()
    return cache_folder() / "verified" / key[:2] / key


def _tag(path: Path) -> str:
    try:
        return file_tag(path.stat())
    except OSError:
        return ""


def _known(path: Path, entry: FileEntry) -> bool:
    tag = _tag(path)
    if not tag:
        return False
    key = (str(path), entry.sha256)
    if _SEEN.get(key) == tag:
        return True
    try:
        if _memo_path(path, entry).read_text() != tag:
            return False
    except OSError:
        return False
    _SEEN[key] = tag
    return True


def _remember(path: Path, entry: FileEntry, tag: str) -> None:
    """Keep the tag with which a file was found to be right.

    Not for a file that changed a moment ago: another change within the same tick of the disk's clock would leave the
    tag as it is.
    """
    if not tag or path.stat().st_ctime_ns > time.time_ns() - GRAIN_NS:
        return
    memo = _memo_path(path, entry)
    _SEEN[str(path), entry.sha256] = tag
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        temporary = memo.with_name(f"{memo.name}.{os.getpid()}")
        temporary.write_text(tag)
        temporary.replace(memo)
    except OSError:
        pass  # the next process hashes again


def _download(objects: Objects, stored: str, path: Path, size: int) -> None:
    """Download a file and put it in its place in one atomic step. A missing object leaves no file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".download-")
        try:
            with os.fdopen(handle, "wb") as file:
                for block in objects.stream(stored):
                    file.write(block)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except FileNotFoundError:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise cache_error(error, size) from error


@contextmanager
def _one_at_a_time(key: str) -> Iterator[None]:
    """Let one process of this machine at a time download or hash a file; the others wait, and use its finding."""
    from filelock import FileLock

    folder = cache_folder() / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        locked = FileLock(folder / key[:3]).acquire()  # 4096 locks are enough, and never need cleaning up
    except OSError as error:
        raise cache_error(error) from error
    with locked:
        yield


def cache_error(error: OSError, needed: int | None = None) -> StoreError:
    """Why the cache cannot be written, and what to do; `needed` bytes were to be."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return StoreError(
        f"this machine's cache {cache_folder()} cannot be written: {error.strerror or error}"
        f"{room_at(cache_folder(), needed) if full else ''} "
        "(set TESSERA_CACHE to a folder with room, or delete the cache: it is rebuilt)"
    )
