"""Files at an address: one interface to a local folder and to a bucket, through obstore.

The store relies on four promises made here. A put writes the whole object or nothing. A put with `create` succeeds
for one caller only. A local put is on the disk when it returns. Every failure is a StoreError that says what to do.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pipeline.errors import StoreError
from pipeline.paths import local_path
from pipeline.store.credentials import s3_options
from pipeline.store.failures import explain

SCHEMES = ("s3", "gs", "az")

# Two changes of a file within one tick of the disk's clock give it the same tag. So the tag of a file that is younger
# than this proves nothing, and its content is read again next time.
GRAIN_NS = 2_000_000_000


@dataclass(frozen=True)
class StoredObject:
    """One object of a listing."""

    path: str  # relative to the address
    size: int
    tag: str  # changes whenever the content is written anew
    modified: float  # seconds since the epoch
    changed_ns: int  # on a disk, the last change of the file or its times; 0 in a bucket, where every put has a new tag


class Conflict(Exception):
    """Somebody else wrote the object first."""


def mask(address: str) -> str:
    """The address without what could be a secret, for messages and logs."""
    address = re.sub(r"(?<=://)[^/@]*@", "***@", address)
    return re.sub(r"\?.*$", "?***", address, flags=re.DOTALL)


class Objects:
    """A folder or a bucket prefix. Paths are relative to it, with forward slashes.

    Can be pickled. It holds no secrets: every process takes its credentials from its own environment (AWS_*,
    GOOGLE_*, AZURE_*), never from the address.
    """

    def __init__(self, address: str) -> None:
        self.address, self.folder = _normalised(address)

    def __reduce__(self) -> tuple[type[Objects], tuple[str]]:
        return Objects, (self.address,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Objects) and other.address == self.address

    def __hash__(self) -> int:
        return hash(self.address)

    def __repr__(self) -> str:
        return f"Objects({self.address!r})"

    def join(self, path: str) -> str:
        """The full address of a path."""
        return f"{self.address.rstrip('/')}/{path}"

    def put(self, path: str, data: bytes | Path, *, create: bool = False, durable: bool = True) -> str:
        """Write one object, whole or not at all.

        Args:
            path: relative to the address.
            data: the content, or a local file with the content.
            create: write only if there is no such object yet.
            durable: return only when a local file is on the disk.

        Returns:
            The object's tag.

        Raises:
            Conflict: with `create`, the object is there already.
        """
        import obstore

        with self._explained("write", path):
            mode: Any = "create" if create else "overwrite"
            try:
                tag = obstore.put(self._client(write=True), path, data, mode=mode)["e_tag"] or ""
            except obstore.exceptions.AlreadyExistsError:
                raise Conflict(path) from None
            except FileNotFoundError:
                if self.folder is None or not isinstance(data, bytes):
                    raise
                # The folder was deleted between its creation and the file's, by gc or by a commit that cleaned up.
                tag = obstore.put(self._client(write=True), path, data, mode=mode)["e_tag"] or ""
            if self.folder is None:
                return tag
            if durable:
                _sync(self.folder / path)
                _sync((self.folder / path).parent)
            return file_tag((self.folder / path).stat())

    def put_moved(self, path: str, file: Path) -> str:
        """Like `put` of a local file that is not needed afterwards: it is moved where possible, else copied."""
        if self.folder is not None:
            with self._explained("write", path), suppress(_CrossDevice):
                target = self.folder / path
                _sync(file)
                _move(file, target)
                _sync(target.parent)
                return file_tag(target.stat())
        tag = self.put(path, file)
        file.unlink(missing_ok=True)
        return tag

    def head(self, path: str) -> StoredObject | None:
        """One object as `walk` would list it; None when there is no such object."""
        import obstore

        with self._explained("look at", path):
            try:
                return _found(obstore.head(self._client(), path))
            except (FileNotFoundError, NotADirectoryError) as error:
                self._require_bucket(error)
                return None

    def put_if(self, path: str, data: bytes, tag: str) -> None:
        """Overwrite an object if its tag is still `tag`. For buckets only.

        Raises:
            Conflict: the object was changed or deleted.
        """
        import obstore

        with self._explained("write", path):
            try:
                obstore.put(self._client(write=True), path, data, mode={"e_tag": tag})
            except (obstore.exceptions.PreconditionError, FileNotFoundError):
                raise Conflict(path) from None

    def get(self, path: str) -> bytes | None:
        """The whole content; None when there is no such object."""
        import obstore

        if not self._exists():
            return None
        with self._explained("read", path):
            try:
                return bytes(obstore.get(self._client(), path).bytes())
            except (FileNotFoundError, NotADirectoryError) as error:
                self._require_bucket(error)
                return None

    def get_tagged(self, path: str) -> tuple[bytes, str] | None:
        """Content and tag that belong together, for `put_if`; None when there is no such object."""
        import obstore

        if not self._exists():
            return None
        with self._explained("read", path):
            try:
                answer = obstore.get(self._client(), path)
                return bytes(answer.bytes()), answer.meta["e_tag"] or ""
            except (FileNotFoundError, NotADirectoryError) as error:
                self._require_bucket(error)
                return None

    def get_range(self, path: str, start: int, end: int) -> bytes:
        """The bytes [start, end) of the content. Raises FileNotFoundError."""
        import obstore

        with self._explained("read", path):
            return bytes(obstore.get_range(self._client(), path, start=start, end=end))

    def stream(self, path: str) -> Iterator[bytes]:
        """The content in blocks of a few MiB.

        Raises:
            FileNotFoundError: there is no such object.
        """
        import obstore

        if self.folder is not None:  # plain reads hash a third faster than a local object stream
            with self._explained("read", path), (self.folder / path).open("rb") as file:
                while block := file.read(4 << 20):
                    yield block
            return
        with self._explained("read", path):
            yield from (bytes(block) for block in obstore.get(self._client(), path).stream(4 << 20))

    def walk(self, prefix: str = "") -> list[StoredObject]:
        """All objects under a folder, sorted by path; none when there is no such folder."""
        import obstore

        if self.folder is not None:
            with self._explained("list", prefix):
                return sorted(_walk(self.folder, self.folder / prefix), key=lambda found: found.path)
        with self._explained("list", prefix):
            blocks = obstore.list(self._client(), prefix or None, chunk_size=1000)
            return sorted((_found(meta) for block in blocks for meta in block), key=lambda found: found.path)

    def folders(self, prefix: str = "") -> list[str]:
        """Names of the folders directly under `prefix`, sorted."""
        import obstore

        if not self._exists():
            return []
        with self._explained("list", prefix):
            if self.folder is not None:
                with suppress(FileNotFoundError), os.scandir(self.folder / prefix) as entries:
                    return sorted(entry.name for entry in entries if entry.is_dir())
                return []
            found = obstore.list_with_delimiter(self._client(), prefix or None)["common_prefixes"]
            return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)

    def delete(self, paths: list[str]) -> None:
        """Delete objects. One that does not exist is no error."""
        import obstore

        with self._explained("delete", paths[0] if paths else ""):
            if self.folder is not None:
                for path in paths:
                    (self.folder / path).unlink(missing_ok=True)
                return
            for start in range(0, len(paths), 1000):
                with suppress(FileNotFoundError):
                    obstore.delete(self._client(), paths[start : start + 1000])

    def delete_folder(self, prefix: str) -> None:
        """Delete everything under a folder and, on a disk, the folder."""
        if self.folder is None:
            self.delete([found.path for found in self.walk(prefix)])
            return
        with self._explained("delete", prefix):
            for _ in range(20):  # others may be deleting, or still writing, in the same folder
                shutil.rmtree(self.folder / prefix, ignore_errors=True)
                if not (self.folder / prefix).exists():
                    return
            shutil.rmtree(self.folder / prefix)  # raises the reason

    def _exists(self) -> bool:
        return self.folder is None or self.folder.is_dir()

    def _require_bucket(self, error: Exception) -> None:
        """Raise `error` when it is the bucket that is missing: servers answer 404 for that and for a missing object."""
        if self.folder is None and "NoSuchBucket" in str(error):
            raise error

    def _client(self, *, write: bool = False) -> Any:
        if self.folder is not None and write:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:  # also of a parent that is not there: /proc takes no folder, and says so like this
                raise explain(error, self.address, "write", "") from error
        return _client(self.address, os.getpid())

    @contextmanager
    def _explained(self, doing: str, path: str) -> Iterator[None]:
        """Turn what obstore or the system raises into a StoreError that names the address and the remedy."""
        try:
            yield
        except (StoreError, Conflict, FileNotFoundError) as error:
            if isinstance(error, FileNotFoundError) and "NoSuchBucket" in str(error):
                raise explain(error, self.address, doing, path) from error
            raise
        except _CrossDevice:
            raise
        except Exception as error:
            raise explain(error, self.address, doing, path) from error


class _CrossDevice(Exception):
    """The file lies on another disk than the store."""


def _normalised(address: str) -> tuple[str, Path | None]:
    """The address without a trailing slash, and the local folder that it stands for (None for a bucket).

    Raises:
        StoreError: it is not the address of a store.
    """
    text = str(address)
    scheme = text.split("://", 1)[0] if "://" in text else ""
    if scheme in ("", "file"):
        if not str(text).strip():
            raise StoreError("store: the address is empty (name a folder, or s3://bucket/prefix)")
        folder = Path(os.path.abspath(local_path(unquote(text[len("file://") :]) if scheme else text)))
        return str(folder), folder
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise StoreError(f"store {mask(text)}: {scheme}:// is no kind of store (use a folder, file://, {known})")
    parts = urlsplit(text)
    if "@" in parts.netloc or parts.query:
        raise StoreError(
            f"store {mask(text)}: an address may not carry credentials or options, it is written into every manifest "
            f"(set them in the environment: {_ENVIRONMENT[scheme]})"
        )
    if not parts.netloc:
        raise StoreError(f"store {text}: the bucket's name is missing (write {scheme}://bucket/prefix)")
    return f"{scheme}://{parts.netloc}/{parts.path.strip('/')}".rstrip("/"), None


_ENVIRONMENT = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
}


@lru_cache(maxsize=32)
def _client(address: str, pid: int) -> Any:
    """The obstore client of an address. `pid` makes it another one in a fork, which may not share connections."""
    from obstore.store import AzureStore, GCSStore, LocalStore, S3Store

    if "://" not in address:
        return LocalStore(address)
    parts = urlsplit(address)
    kind: Any = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[parts.scheme]
    retry = {"max_retries": 6, "retry_timeout": timedelta(seconds=60)}
    options = s3_options(address) if parts.scheme == "s3" else {}
    return kind(parts.netloc, prefix=parts.path.strip("/") or None, retry_config=retry, **options)


def _found(meta: Any) -> StoredObject:
    tag = meta["e_tag"] or str(meta["last_modified"])
    return StoredObject(meta["path"], meta["size"], tag, meta["last_modified"].timestamp(), 0)


def _walk(root: Path, folder: Path) -> Iterator[StoredObject]:
    """Every file under `folder`, without those that are deleted meanwhile."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            try:
                stat = os.stat(path)
            except FileNotFoundError:
                continue
            relative = os.path.relpath(path, root).replace(os.sep, "/")
            yield StoredObject(relative, stat.st_size, file_tag(stat), stat.st_mtime, stat.st_ctime_ns)


def file_tag(stat: os.stat_result) -> str:
    """A text that changes whenever a local file is written, replaced or given other times."""
    return f"{stat.st_ino:x}-{stat.st_size:x}-{stat.st_mtime_ns:x}-{stat.st_ctime_ns:x}"


def _move(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(file, target)
    except OSError as error:
        if error.errno == 18:  # EXDEV
            raise _CrossDevice from None
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
