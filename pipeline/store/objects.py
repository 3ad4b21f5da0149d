"""Files at an address: one interface to a local folder and to a bucket, through obstore.

The store relies on four promises made here. A put writes the whole object or nothing. A put with `create` succeeds
for one caller only. A local put is on the disk when it returns. Every failure is a StoreError that says what to do.

A bucket's failures that pass by themselves, such as throttling, are waited for (patience.py).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import StoreError
from pipeline.store.address import normalised
from pipeline.store.client import client_of
from pipeline.store.failures import explain
from pipeline.store.patience import Patience, passes

_T = TypeVar("_T")

# Two changes of a file within one tick of the disk's clock give it the same tag. So the tag of a file that is younger
# than this proves nothing, and its content is read again next time.
GRAIN_NS = 2_000_000_000
PIECE = 5 << 20  # bytes: a larger file is uploaded to a bucket in pieces of this size


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


class Objects:
    """A folder or a bucket prefix. Paths are relative to it, with forward slashes.

    Can be pickled. It holds no secrets: every process takes its credentials from its own environment (AWS_*,
    GOOGLE_*, AZURE_*), never from the address.
    """

    def __init__(self, address: str) -> None:
        self.address, self.folder = normalised(address)

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

        mode: Any = "create" if create else "overwrite"
        if self.folder is None:
            return self._put_object(path, data, mode)
        with self._explained("write", path, _size(data)):
            try:
                obstore.put(self._client(write=True), path, data, mode=mode)
            except obstore.exceptions.AlreadyExistsError:
                raise Conflict(path) from None
            except FileNotFoundError:
                if not isinstance(data, bytes):
                    raise
                # The folder was deleted between its creation and the file's, by gc or by a commit that cleaned up.
                obstore.put(self._client(write=True), path, data, mode=mode)
            if durable:
                _sync(self.folder / path)
                _sync((self.folder / path).parent)
            return file_tag((self.folder / path).stat())

    def put_moved(self, path: str, file: Path) -> str:
        """Like `put` of a local file that is not needed afterwards: it is moved where possible, else copied."""
        if self.folder is not None:
            with self._explained("write", path, _size(file)), suppress(_CrossDevice):
                target = self.folder / path
                _sync(file)
                _move(file, target)
                _sync(target.parent)
                return file_tag(target.stat())
        tag = self.put(path, file)
        file.unlink(missing_ok=True)
        return tag

    def put_if(self, path: str, data: bytes, tag: str) -> None:
        """Overwrite an object if `get_tagged` would still give this tag. For buckets only.

        Raises:
            Conflict: the object was changed or deleted.
        """
        self._put_object(path, data, {"version": tag} if self._google else {"e_tag": tag})

    def head(self, path: str) -> StoredObject | None:
        """One object as `walk` would list it; None when there is no such object."""
        import obstore

        try:
            return self._ask("look at", path, lambda: _found(obstore.head(self._client(), path)))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def get(self, path: str) -> bytes | None:
        """The whole content; None when there is no such object."""
        if self.folder is not None:
            found = self.get_tagged(path)
            return found[0] if found else None
        try:
            return b"".join(self.stream(path))
        except FileNotFoundError:
            return None

    def get_tagged(self, path: str) -> tuple[bytes, str] | None:
        """Content and tag that belong together, for `put_if`; None when there is no such object."""
        import obstore

        def content() -> tuple[bytes, str]:
            answer = obstore.get(self._client(), path)
            # Google's conditions are on the generation of an object, all others' on its etag.
            return bytes(answer.bytes()), answer.meta["version" if self._google else "e_tag"] or ""

        if not self._exists():
            return None
        try:
            return self._ask("read", path, content)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def get_range(self, path: str, start: int, end: int) -> bytes:
        """The bytes [start, end) of the content. Raises FileNotFoundError."""
        import obstore

        return self._ask("read", path, lambda: bytes(obstore.get_range(self._client(), path, start=start, end=end)))

    def stream(self, path: str) -> Iterator[bytes]:
        """The content in blocks of about a MiB or more.

        Raises:
            FileNotFoundError: there is no such object.
        """
        import obstore

        if self.folder is not None:  # plain reads hash a third faster than a local object stream
            with self._explained("read", path), (self.folder / path).open("rb") as file:
                while block := file.read(4 << 20):
                    yield block
            return
        at, tag = 0, ""
        with self._explained("read", path) as patience:
            while True:
                try:
                    rest: Any = {"range": {"offset": at}, "if_match": tag or None} if at else None
                    answer = obstore.get(self._client(), path, options=rest)
                    tag = answer.meta["e_tag"] or ""
                    for block in answer.stream(1 << 20):
                        at += len(block)
                        patience.answered()
                        yield bytes(block)
                    return
                except obstore.exceptions.PreconditionError:
                    raise StoreError(
                        f"store {self.address}: {path} was written anew while it was read (run the same command again)"
                    ) from None
                except FileNotFoundError:
                    raise
                except Exception as error:
                    patience.wait_after(error)
                    if at and at == answer.meta["size"]:
                        return

    def walk(self, prefix: str = "") -> list[StoredObject]:
        """All objects under a folder, sorted by path; none when there is no such folder."""
        import obstore

        if self.folder is not None:
            with self._explained("list", prefix):
                return sorted(_walk(self.folder, self.folder / prefix), key=lambda found: found.path)
        found: list[StoredObject] = []
        with self._explained("list", prefix) as patience:
            while True:
                try:
                    after = found[-1].path if found else None
                    for block in obstore.list(self._client(), prefix or None, offset=after, chunk_size=1000):
                        found += map(_found, block)
                        patience.answered()
                    break
                except Exception as error:
                    patience.wait_after(error)
        # A console's "folder" is an empty object whose name ends with a slash; obstore lists it without the slash.
        empty = [one.path for one in found if not one.size]
        with ThreadPoolExecutor(16) as pool:
            folders = {path for path, there in zip(empty, pool.map(self.head, empty), strict=True) if there is None}
        return sorted((one for one in found if one.path not in folders), key=lambda one: one.path)

    def folders(self, prefix: str = "") -> list[str]:
        """Names of the folders directly under `prefix`, sorted."""
        import obstore

        if not self._exists():
            return []
        if self.folder is not None:
            with self._explained("list", prefix), suppress(FileNotFoundError), os.scandir(self.folder / prefix) as all_:
                return sorted(entry.name for entry in all_ if entry.is_dir())
            return []
        found = self._ask("list", prefix, lambda: obstore.list_with_delimiter(self._client(), prefix or None))
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found["common_prefixes"])

    def delete(self, paths: list[str]) -> None:
        """Delete objects. One that does not exist is no error."""
        import obstore

        if self.folder is not None:
            with self._explained("delete", paths[0] if paths else ""):
                for path in paths:
                    (self.folder / path).unlink(missing_ok=True)
            return
        for start in range(0, len(paths), 1000):
            some = paths[start : start + 1000]
            try:
                self._ask("delete", some[0], lambda some=some: obstore.delete(self._client(), some))  # type: ignore[misc]
            except FileNotFoundError:  # a server that deletes one by one stops at the first that does not exist
                for path in some if len(some) > 1 else ():
                    self.delete([path])

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

    @property
    def _google(self) -> bool:
        return self.address.startswith("gs://")

    def _exists(self) -> bool:
        return self.folder is None or self.folder.is_dir()

    def _put_object(self, path: str, data: bytes | Path, mode: Any) -> str:
        """Write an object of a bucket and return its tag.

        Raises:
            Conflict: the mode is a condition, and it does not hold.
        """
        import obstore

        in_pieces = mode == "overwrite" and _size(data) > PIECE
        with self._explained("write", path) as patience:
            while True:
                try:
                    client = client_of(self.address, os.getpid(), in_pieces)
                    put = obstore.put(client, path, data, mode=mode, use_multipart=in_pieces, chunk_size=PIECE)
                    patience.answered()
                    return put["e_tag"] or ""
                except Exception as error:
                    refused = (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError)
                    if mode == "overwrite" or passes(error) or not isinstance(error, (*refused, FileNotFoundError)):
                        patience.wait_after(error)
                        continue
                    if "NoSuchBucket" in str(error):
                        raise
                    # A try before this one may have succeeded, and only its answer was lost.
                    found = self.get_tagged(path) if patience.failures else None
                    if found is not None and found[0] == (data if isinstance(data, bytes) else data.read_bytes()):
                        return found[1]
                    raise Conflict(path) from None

    def _ask(self, doing: str, path: str, request: Callable[[], _T]) -> _T:
        """What a request answers that may be repeated: it changes nothing, or the second time nothing more."""
        with self._explained(doing, path) as patience:
            while True:
                try:
                    answer = request()
                    patience.answered()
                    return answer
                except Exception as error:
                    patience.wait_after(error)

    def _client(self, *, write: bool = False) -> Any:
        if self.folder is not None and write:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:  # also of a parent that is not there: /proc takes no folder, and says so like this
                raise explain(error, self.address, "write", "") from error
        return client_of(self.address, os.getpid(), False)

    @contextmanager
    def _explained(self, doing: str, path: str, needed: int | None = None) -> Iterator[Patience]:
        """Turn what obstore or the system raises into a StoreError that names the address and the remedy."""
        patience = Patience(self.address)
        try:
            yield patience
        except (StoreError, Conflict, _CrossDevice):
            raise
        except Exception as error:
            # Servers answer 404 for a missing bucket as for a missing object.
            if isinstance(error, FileNotFoundError) and "NoSuchBucket" not in str(error):
                raise
            raise explain(error, self.address, doing, path, patience.tried(), needed) from error


class _CrossDevice(Exception):
    """The file lies on another disk than the store."""


def _size(data: bytes | Path) -> int:
    return len(data) if isinstance(data, bytes) else data.stat().st_size


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
