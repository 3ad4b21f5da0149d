"""The files of a source, read in the same way from a local folder and from a bucket."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

from pipeline.errors import SourceError, StoreError
from pipeline.stage import open_source
from stages.data.errors import ImageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
JPEG_SUFFIXES = (".jfif", ".jpe", ".jpg_large", ".pjpeg")  # a JPEG by names that are not read
UNREAD_SUFFIXES = (
    *(".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".raw", ".dng"),
    *JPEG_SUFFIXES,
)


class Files:
    """What lies under one address. Paths are relative to it, with forward slashes; hidden files do not count.

    Pickles as the address; the listing stays with the process that made it.
    """

    def __init__(self, address: str) -> None:
        with _as_source_error():
            self._objects = open_source(address)
        self.address = self._objects.address
        self.links_out: dict[str, str] = {}  # link -> what it leads to, outside the source; known after the listing
        self.not_utf8: list[str] = []  # names that are left out of the listing, readable; known after it

    def __reduce__(self) -> tuple[type[Files], tuple[str]]:
        return Files, (self.address,)

    @property
    def folder(self) -> Path | None:
        """The local folder; None for a bucket."""
        return self._objects.folder

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of each file by its path, sorted. Raises SourceError for a source that is missing or empty."""
        if self.folder is not None and not self.folder.exists():
            raise SourceError(f"source {self.address} does not exist (is the path right, seen from where you start?)")
        if self.folder is not None and not self.folder.is_dir():
            raise SourceError(f"source {self.address} is a file (this layout reads a folder or a bucket address)")
        if self.folder is not None:
            found = {path: _size(entry) for path, entry in self._local()}
        else:
            with _as_source_error():
                found = {found.path: found.size for found in self._objects.walk() if not _hidden(found.path)}
        if not found:
            raise SourceError(
                f"source {self.address} is empty: no file in it, hidden ones aside (fill it, or name another source)"
            )
        return dict(sorted(found.items()))

    def names(self, limit: int) -> list[str]:
        """The paths in a local folder, without a look at any file; none for a bucket, a file, or more than `limit`."""
        if self.folder is None or not self.folder.is_dir():
            return []
        found = [path for path, _ in islice(self._local(), limit + 1)]
        return sorted(found) if len(found) <= limit else []

    def _local(self) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Every file below the folder; fills `links_out` and `not_utf8` on its way."""
        self.links_out, self.not_utf8 = {}, []
        root = str(self.folder)
        for path, entry in _walk(root, "", ()):
            if not _is_text(path):
                self.not_utf8.append(os.fsencode(path).decode("utf-8", "backslashreplace"))
                continue
            if entry.is_symlink() and (target := _outside(root, entry.path)) is not None:
                self.links_out[path] = target
            if not entry.is_dir():
                yield path, entry

    def images(self, under: str = "") -> Iterator[str]:
        """Paths whose ending is one that `images.decode` reads."""
        return (path for path in self.sizes if path.startswith(under) and path.lower().endswith(SUFFIXES))

    def unread(self, under: str = "") -> Iterator[str]:
        """Paths whose ending is that of an image format that is not read: each becomes a problem with its name."""
        return (path for path in self.sizes if path.startswith(under) and path.lower().endswith(UNREAD_SUFFIXES))

    def read(self, path: str) -> bytes:
        """The content of one file. Raises ImageError when it cannot be read, StoreError when the bucket cannot be."""
        if self.folder is not None:
            try:
                return (self.folder / path).read_bytes()
            except OSError as error:
                raise ImageError(f"cannot be read: {error.strerror or error}") from None
        data = self._objects.get(path)
        if data is None:
            raise ImageError("cannot be read: the object is gone")
        return data

    def open(self, path: str) -> IO[bytes]:
        """A seekable binary file, for readers that need only parts of it. Raises SourceError when it is gone."""
        if self.folder is not None:
            return (self.folder / path).open("rb")
        with _as_source_error():
            found = self._objects.head(path)
        if found is None:
            raise SourceError(f"source {self._objects.join(path)} is gone")
        return io.BufferedReader(_BucketFile(partial(self._objects.get_range, path), found.size), 1 << 20)


def read_file(address: str) -> bytes:
    """The content of one file by its own address. Raises SourceError."""
    parent, _, name = address.rstrip("/").rpartition("/")
    files = Files(parent or ("/" if address.startswith("/") else "."))
    try:
        with _as_source_error():
            return files.read(name)
    except ImageError as error:
        raise SourceError(f"{address} {error} (check the path)") from None


def split_address(address: str) -> tuple[str, str]:
    """("folder or prefix", "name") of a source that may be one file; the name is empty for a folder."""
    with _as_source_error():
        objects = open_source(address)
        if objects.folder is not None:
            return (str(objects.folder.parent), objects.folder.name) if objects.folder.is_file() else (address, "")
        parent, _, name = objects.address.rpartition("/")
        single = objects.address.count("/") > 2 and open_source(parent).head(name) is not None
    return (parent, name) if single else (address, "")


class _BucketFile(io.RawIOBase):
    """An object in a bucket, read by ranges."""

    def __init__(self, read_range: Callable[[int, int], bytes], size: int) -> None:
        self._read_range, self._size, self._at = read_range, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        data = self._read_range(self._at, end)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _walk(folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Every file below a local folder, and every link. Links are followed, as the source's digest follows them."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if _hidden(entry.name):
                continue
            if entry.is_dir():
                if entry.is_symlink() or not _is_text(entry.name):
                    yield f"{prefix}{entry.name}", entry
                stat = entry.stat()
                if _is_text(entry.name) and (stat.st_dev, stat.st_ino) not in above:  # a link to above has no end
                    yield from _walk(entry.path, f"{prefix}{entry.name}/", (*above, (stat.st_dev, stat.st_ino)))
            elif entry.is_file() or entry.is_symlink():
                yield f"{prefix}{entry.name}", entry


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return 0  # a link that leads nowhere: reading it names the file and the reason


def _outside(root: str, link: str) -> str | None:
    """What a link leads to, where that is outside of `root`. One step, without a look at the target."""
    target = os.path.normpath(os.path.join(os.path.dirname(link), os.readlink(link)))
    return None if target == root or target.startswith(f"{root.rstrip('/')}/") else target


def _is_text(name: str) -> bool:
    """Whether a name is UTF-8: Python keeps other bytes as these letters."""
    return not any("\udc80" <= letter <= "\udcff" for letter in name)


def _hidden(path: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))


@contextmanager
def _as_source_error() -> Iterator[None]:
    """What the store's client says about a source, without calling it a store."""
    try:
        yield
    except StoreError as error:
        raise SourceError(f"source {str(error).removeprefix('store ')}") from error
