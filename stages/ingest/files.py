"""The files of a source, read in the same way from a local folder and from a bucket."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any

from pipeline.errors import SourceError, StoreError
from pipeline.stage import open_source
from stages.data.images import ImageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
UNREAD_SUFFIXES = (".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".raw", ".dng")


class Files:
    """What lies under one address. Paths are relative to it, with forward slashes; hidden files do not count.

    Pickles as the address; the listing stays with the process that made it.
    """

    def __init__(self, address: str) -> None:
        with _as_source_error():
            self._objects = open_source(address)
        self.address = self._objects.address

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
            found = dict(_walk(str(self.folder), "", ()))
        else:
            with _as_source_error():
                found = {found.path: found.size for found in self._objects.walk() if not _hidden(found.path)}
        if not found:
            raise SourceError(f"source {self.address} is empty: no file in it (fill it, or name another source)")
        return dict(sorted(found.items()))

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


def _walk(folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, int]]:
    """Every file below a local folder. Links are followed, as the source's digest follows them."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if _hidden(entry.name):
                continue
            if entry.is_dir():
                stat = entry.stat()
                if (stat.st_dev, stat.st_ino) not in above:  # a link to a folder above it has no end
                    yield from _walk(entry.path, f"{prefix}{entry.name}/", (*above, (stat.st_dev, stat.st_ino)))
            elif entry.is_file():
                yield f"{prefix}{entry.name}", entry.stat().st_size
            elif entry.is_symlink():
                yield f"{prefix}{entry.name}", 0  # it leads nowhere: reading it names the file and the reason


def _hidden(path: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))


@contextmanager
def _as_source_error() -> Iterator[None]:
    """What the store's client says about a source, without calling it a store."""
    try:
        yield
    except StoreError as error:
        raise SourceError(f"source {str(error).removeprefix('store ')}") from error
