"""Leases: one process computes an artifact while others wait for it.

The holder writes a heartbeat into its lease. Another process may take a lease over when the holder is dead. On the
same machine that is seen at once; from another machine, when there was no heartbeat for a minute.

A lease saves work, and correct artifacts do not depend on it: when two processes compute the same artifact in spite of
it, the store's commit accepts one of them as a whole.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType

from pipeline.errors import StoreError
from pipeline.store.failures import explain
from pipeline.store.objects import Conflict, Objects
from pipeline.store.owner import Owner, this_process

BEAT = 10.0  # seconds between heartbeats
STALE = 60.0  # seconds without a heartbeat after which a process on another machine counts as dead
GUARD_POLL = 0.005  # a guard is held for the time of two small file operations
# Seconds since the last heartbeat, by comparing two machines' clocks: more than such clocks differ, even where one of
# them is set to a neighbouring time zone. A lease that is younger is watched for `STALE` seconds on one clock instead.
LONG_DEAD = 2 * 3600.0

_OURS: set[str] = set()  # tokens of the leases that this process holds or is taking
_HELD: dict[tuple[str, str], str] = {}  # (store address, artifact) -> token of the lease this process holds


@dataclass(frozen=True)
class Holder:
    """What a lease file says."""

    token: str
    owner: Owner
    beat: float  # the holder's clock, seconds since the epoch
    since: float

    def __str__(self) -> str:
        return f"{self.owner}, since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(self.since))}"

    def to_bytes(self) -> bytes:
        """The lease file's content."""
        fields = {"token": self.token, "owner": self.owner.to_dict(), "beat": self.beat, "since": self.since}
        return json.dumps(fields).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Holder | None:
        """Read what `to_bytes` wrote; None for anything else, such as a file that a full disk left unfinished."""
        try:
            raw = json.loads(data)
            return cls(str(raw["token"]), Owner.from_dict(raw["owner"]), float(raw["beat"]), float(raw["since"]))
        except (ValueError, KeyError, TypeError):
            return None

    def long_gone(self) -> bool:
        """Whether the holder is certainly dead, as far as one look at the lease can tell."""
        if self.owner == this_process():  # one that could not be given back because the store was away is nobody's
            return self.token not in _OURS
        alive = self.owner.alive()
        return not alive if alive is not None else time.time() - self.beat > LONG_DEAD


class Lease:
    """The right to compute one artifact. `with store.lease(kind, fingerprint, waiting=print):` waits for it.

    After waiting, look again whether the artifact is there: the other process has probably made it.

    Args:
        objects: the store's files.
        artifact: "kind/fingerprint", or another name under which processes want to exclude each other.
        waiting: called once for every holder that is waited for.
        beat: seconds between heartbeats.
    """

    def __init__(
        self, objects: Objects, artifact: str, waiting: Callable[[Holder], None] | None = None, *, beat: float = BEAT
    ) -> None:
        self._objects, self.artifact, self._waiting = objects, artifact, waiting
        self._path = lease_path(artifact)
        self._beat_every, self._stale_after = beat, STALE / BEAT * beat
        self._token = ""
        self._since = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.lost = False  # whether another process took it over, because this one seemed to be dead

    def __enter__(self) -> Lease:
        self.acquire(self._waiting)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def held(self) -> bool:
        """Whether this process holds it."""
        return bool(self._token) and not self.lost

    def holder(self) -> Holder | None:
        """Who the lease file names, whether alive or dead; None when nobody holds the lease."""
        data = self._objects.get(self._path)
        return Holder.from_bytes(data) if data else None

    def acquire(self, waiting: Callable[[Holder], None] | None = None, *, timeout: float | None = None) -> None:
        """Wait until the lease is this process's. `waiting` is called once for every holder that is waited for.

        Raises:
            StoreError: another process held it for `timeout` seconds.
        """
        told, seen, seen_at, start = "", ("", 0.0), time.monotonic(), time.monotonic()
        while not self.try_acquire():
            holder = self.holder()
            if holder is None:
                continue
            if (holder.token, holder.beat) != seen:
                seen, seen_at = (holder.token, holder.beat), time.monotonic()
            # Seconds without a heartbeat are counted on this machine's clock: another machine's may be wrong.
            if holder.owner.alive() is None and time.monotonic() - seen_at > self._stale_after and self._take(holder):
                break
            if waiting is not None and holder.token != told:
                told = holder.token
                waiting(holder)
            if timeout is not None and time.monotonic() - start > timeout:
                raise StoreError(f"{self.artifact} is still being computed by {holder} (wait for it, or end it)")
            time.sleep(0.2 if self._objects.folder is not None else 2.0)

    def try_acquire(self) -> bool:
        """Take the lease if nobody alive holds it."""
        if self.held:
            raise RuntimeError(f"lease of {self.artifact} is held already")
        holder = self.holder()
        if holder is not None:
            return holder.long_gone() and self._take(holder)
        with self._guard(), self._taking() as mine:
            try:
                self._objects.put(self._path, mine.to_bytes(), create=True, durable=False)
            except Conflict:
                return self._take_unreadable(mine)
            self._started(mine)
        return True

    def release(self) -> None:
        """Give it back; harmless when it is not held. Where the store is away, it ends with this process."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._token:
            _HELD.pop((self._objects.address, self.artifact), None)
            _OURS.discard(self._token)
            with suppress(StoreError), self._guard():
                holder = self.holder()
                if holder is not None and holder.token == self._token:
                    self._objects.delete([self._path])
            self._token = ""

    def _take_unreadable(self, mine: Holder) -> bool:
        """Take a lease whose file nobody can read, within the guard; False when it is somebody's, or gone again."""
        found = self._objects.get_tagged(self._path)
        if found is None or Holder.from_bytes(found[0]) is not None:
            return False
        try:
            self._overwrite(mine, found[1])
        except Conflict:
            return False
        self._started(mine)
        return True

    @contextmanager
    def _taking(self) -> Iterator[Holder]:
        """What this process writes into the lease file, known to its other threads as that of a living holder."""
        self._since = time.time()
        mine = Holder(uuid.uuid4().hex, this_process(), self._since, self._since)
        _OURS.add(mine.token)
        try:
            yield mine
        finally:
            if self._token != mine.token:
                _OURS.discard(mine.token)

    def _started(self, mine: Holder) -> None:
        self._token, self.lost = mine.token, False
        _HELD[self._objects.address, self.artifact] = mine.token
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._beat, args=(self._stop,), name=f"lease {self.artifact}", daemon=True
        )
        self._thread.start()

    def _take(self, dead: Holder) -> bool:
        """Take the lease of a dead holder; False when another process was faster."""
        with self._taking() as mine:
            if not self._replace(dead.token, dead.beat, mine):
                return False
            self._started(mine)
        return True

    def _replace(self, token: str, beat: float | None, new: Holder) -> bool:
        """Overwrite the lease if its token, and its heartbeat unless `beat` is None, are still these.

        Of several processes that try it at once, one succeeds.
        """
        with self._guard():
            found = self._objects.get_tagged(self._path)
            holder = Holder.from_bytes(found[0]) if found else None
            if found is None or holder is None or holder.token != token or (beat is not None and holder.beat != beat):
                return False
            try:
                self._overwrite(new, found[1])
            except Conflict:
                return False
            return True

    def _overwrite(self, new: Holder, tag: str) -> None:
        """Replace the lease file if its tag is still `tag`, within the guard."""
        if self._objects.folder is not None:  # a disk has no conditional put; the guard excludes others
            self._objects.put(self._path, new.to_bytes(), durable=False)
        else:
            self._objects.put_if(self._path, new.to_bytes(), tag)

    def _beat(self, stop: threading.Event) -> None:
        mine = Holder(self._token, this_process(), 0.0, self._since)
        while not stop.wait(self._beat_every):
            try:
                if not self._replace(mine.token, None, Holder(mine.token, mine.owner, time.time(), mine.since)):
                    self.lost = True
                    return
            except StoreError:
                continue  # the store is away for a moment: the next beat may reach it

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """On a disk, let one process at a time look at a lease and change it."""
        if self._objects.folder is None:
            yield
            return
        from filelock import FileLock

        guard = self._objects.folder / ".tessera" / "leases" / ".guard"
        try:
            guard.parent.mkdir(parents=True, exist_ok=True)
            locked = FileLock(guard).acquire(poll_interval=GUARD_POLL)
        except OSError as error:
            raise explain(error, self._objects.address, "write", self._path) from error
        with locked:
            yield


def lease_path(artifact: str) -> str:
    """Where the lease of an artifact is, relative to the store."""
    return f".tessera/leases/{artifact}.json"


def held_token(objects: Objects, artifact: str) -> str:
    """The token of the lease that this process holds on an artifact, or ""."""
    return _HELD.get((objects.address, artifact), "")


def live_holder(objects: Objects, artifact: str) -> Holder | None:
    """Who holds the lease on an artifact; None when nobody does, or when the holder is certainly dead."""
    holder = Lease(objects, artifact).holder()
    return None if holder is None or holder.long_gone() else holder
