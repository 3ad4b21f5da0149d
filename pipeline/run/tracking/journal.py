"""The records of one run on this machine's disk, written before anything is sent: a journal.

    <state>/tracking/<digest of the address>/<id>/
        about.json      address without user and password, experiment, host
        records.jsonl   what there is to tell, one JSON object a line, only appended
        sent.jsonl      how far the server has it, and the ids that it gave
        files/          previews and the like, to be uploaded
        lock            held by the run that writes, or by who sends what a dead run has left

A journal is deleted when everything in it has arrived. One whose lock is free belongs to a run that has ended, or that
was killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.run.tracking.address import anonymous
from pipeline.run.tracking.records import Record

ABOUT, RECORDS, SENT, FILES, LOCK = "about.json", "records.jsonl", "sent.jsonl", "files", "lock"
READ_BYTES = 1 << 18  # read at once: what waits on the disk may be much more than should be in memory
FOREIGN_SECONDS = 3600.0  # a journal of another host is left alone for as long: its lock may not be seen from here


class Journal:
    """One run's records. `append` may be called from several threads; one thread reads and notes what was sent."""

    def __init__(self, folder: Path, lock: FileLock) -> None:
        self.folder, self._lock = folder, lock
        self.about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        self.position = 0  # bytes of the records that the server has
        self.ids: dict[str, dict[str, str]] = {"runs": {}, "models": {}}  # our name -> MLflow's id
        self._file: int | None = None
        self._guard = threading.Lock()
        for line in _lines(folder / SENT):
            self.position = max(self.position, line.get("to", 0))
            for kind, found in self.ids.items():
                found |= line.get(kind, {})

    @classmethod
    def create(cls, uri: str, experiment: str) -> Journal:
        """A new journal, for this process to write.

        Raises:
            OSError: it cannot be written.
        """
        parent = _writable(uri)
        folder = parent / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:12]}"
        made = Path(tempfile.mkdtemp(prefix=".new-", dir=parent))
        about = {"address": anonymous(uri), "experiment": experiment, "host": socket.gethostname()}
        (made / ABOUT).write_text(json.dumps(about), encoding="utf-8")
        lock = _lock(made)
        lock.acquire(timeout=0)
        made.rename(folder)  # locked before it can be found
        return cls(folder, lock)

    @property
    def records(self) -> Path:
        """The file of records."""
        return self.folder / RECORDS

    def append(self, record: Record) -> None:
        """Write one record. It survives the process from then on.

        Raises:
            OSError: the disk is full, or gone.
        """
        line = (json.dumps(record, default=str) + "\n").encode()
        with self._guard:
            if self._file is None:
                self._file = os.open(self.records, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            if os.write(self._file, line) != len(line):
                raise OSError(28, "No space left on device", str(self.records))

    def keep_file(self, name: str, data: bytes) -> str:
        """Keep a file for an upload beside the records, and return its path there."""
        kept = Path(FILES) / uuid.uuid4().hex / name
        (self.folder / kept).parent.mkdir(parents=True)
        (self.folder / kept).write_bytes(data)
        return str(kept)

    def read(self) -> tuple[list[Record], int]:
        """The next records that the server does not have, and the position after them; none when it has all."""
        try:
            with self.records.open("rb") as file:
                file.seek(self.position)
                data = file.read(READ_BYTES)
                if data and b"\n" not in data:
                    data += file.readline()
        except FileNotFoundError:
            return [], self.position
        whole = data[: data.rfind(b"\n") + 1]  # a line that a kill cut off has no end
        return [record for line in whole.splitlines() if (record := _parsed(line))], self.position + len(whole)

    def note_sent(self, position: int, **ids: dict[str, str]) -> None:
        """Note how far the server has the records, and ids that it gave."""
        with (self.folder / SENT).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"to": position, **ids}) + "\n")
        self.position = position
        for kind, given in ids.items():
            self.ids[kind] |= given

    @property
    def waiting(self) -> int:
        """How many records the server does not have."""
        try:
            with self.records.open("rb") as file:
                file.seek(self.position)
                return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(READ_BYTES), b""))
        except FileNotFoundError:
            return 0

    def unfinished(self) -> tuple[list[str], int]:
        """Runs whose end was never written, nested ones first, and the time of the last record in milliseconds."""
        begun: dict[str, None] = {}
        last = 0
        for record in _lines(self.records):
            last = record.get("at", last)
            if record["op"] == "run":
                begun[record["run"]] = None
            elif record["op"] == "end":
                begun.pop(record["run"], None)
        return [*reversed(begun)], last

    def close(self, *, delete: bool) -> None:
        """Give the journal back: to whoever sends the rest, or, when all has arrived, to nobody."""
        with self._guard:
            if self._file is not None:
                os.close(self._file)
                self._file = None
        if delete:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()


def leftovers(uri: str | None = None) -> Iterator[Journal]:
    """Journals that no living process holds, oldest first. The caller closes each.

    Args:
        uri: the tracking address they are for; None for any.
    """
    for folder in _folders(uri):
        with contextlib.suppress(OSError, ValueError, KeyError, Timeout):
            about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            if about["host"] != socket.gethostname() and _age(folder) < FOREIGN_SECONDS:
                continue
            lock = _lock(folder)
            lock.acquire(timeout=0)
            if not (folder / ABOUT).exists():  # sent and deleted by another process just now
                lock.release()
                shutil.rmtree(folder, ignore_errors=True)
                continue
            yield Journal(folder, lock)


def are_there_leftovers(uri: str) -> bool:
    """Whether there may be journals to send, without a look into them."""
    return any(True for _ in _folders(uri))


def state_folder() -> Path:
    """What must not be lost on this machine: `TESSERA_STATE`, or `tessera` in the user's state folder."""
    chosen = os.environ.get("TESSERA_STATE")
    base = Path(chosen) if chosen else Path(os.environ.get("XDG_STATE_HOME", "~/.local/state")) / "tessera"
    return base.expanduser().absolute()


def _bases() -> list[Path]:
    """The user's state folder, and what takes its place where that cannot be written, as in many a container."""
    return [state_folder() / "tracking", Path(tempfile.gettempdir()) / f"tessera-{os.getuid()}" / "tracking"]


def _writable(uri: str) -> Path:
    problem: OSError | None = None
    for base in _bases():
        try:
            base.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder = base / _digest(uri)
            folder.mkdir(exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
        except OSError as error:
            problem = problem or error
    raise problem or OSError(13, "Permission denied", str(state_folder()))


def _folders(uri: str | None) -> list[Path]:
    inside = _digest(uri) if uri is not None else "*"
    return sorted((about.parent for base in _bases() for about in base.glob(f"{inside}/[!.]*/{ABOUT}")), key=_name)


def _name(folder: Path) -> str:
    return folder.name


def _digest(uri: str) -> str:
    return hashlib.sha256(anonymous(uri).encode()).hexdigest()[:16]


def _lock(folder: Path) -> FileLock:
    return FileLock(folder / LOCK, thread_local=False)  # released by another thread than the one that took it


def _age(folder: Path) -> float:
    return time.time() - max(file.stat().st_mtime for file in folder.iterdir())


def _lines(file: Path) -> Iterator[Record]:
    with contextlib.suppress(FileNotFoundError), file.open("rb") as lines:
        for line in lines:
            if found := _parsed(line):
                yield found


def _parsed(line: bytes) -> Record | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
