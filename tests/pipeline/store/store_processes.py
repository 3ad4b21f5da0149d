"""Processes for the store's fault tests: a script that is killed by the test, or kills itself.

Forks before obstore starts its threads, and after everything else is imported: so a hundred crashes take seconds.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import filelock  # noqa: F401 - the store imports these two when it first needs them
import psutil  # noqa: F401

from pipeline.store.lease import BEAT, Lease
from pipeline.store.objects import Objects
from pipeline.store.store import ArtifactStore

SHARDS = 3
CHANGES = ("put", "put_moved", "put_if", "delete", "delete_folder")  # every way in which a store changes


def content(index: int, who: str = "") -> bytes:
    return f"shard {index} of {who or 'anybody'} ".encode() * 50


def write(address: str, kind: str, fingerprint: str, who: str = "", ready: Path | None = None) -> list[str]:
    """Write and commit one artifact, continuing an earlier attempt; returns what was done, shard by shard."""
    store, done = ArtifactStore(address), []
    with store.lease(kind, fingerprint):
        writer = store.begin(kind, fingerprint)
        done += _fill(writer, who)
        writer.commit(counts={"shards": SHARDS}, notes={"who": who})
    return done


def _fill(writer: object, who: str) -> list[str]:
    from pipeline.store.writer import ArtifactWriter

    assert isinstance(writer, ArtifactWriter)
    done = []
    for index in range(SHARDS):
        if writer.shard_done(index, ".bin"):
            done.append(f"kept {index}")
            continue
        writer.put_file(f"part-{index:05d}.bin", content(index, who))
        writer.record(f"shard {index}", {"who": who})
        done.append(f"made {index}")
    writer.put_file("summary.json", f'{{"who": "{who}"}}'.encode())
    return done


def crash_after(count: int, *, before: bool) -> None:
    """Kill this process at its `count`-th change of a store, before the change or after it."""
    left = [count]

    def deadly(change):  # type: ignore[no-untyped-def]
        def wrapped(*args, **kwargs):  # type: ignore[no-untyped-def]
            left[0] -= 1
            if before and left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            result = change(*args, **kwargs)
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    for name in CHANGES:
        setattr(Objects, name, deadly(getattr(Objects, name)))


def crashes(root: Path) -> None:
    """One store for every point at which a writer can die: root/write-before-000, root/write-after-000, ...

    And for every point at which the deletion of a whole artifact can: root/discard-before-000, ...
    """
    for act, when in (("write", "before"), ("write", "after"), ("discard", "before"), ("discard", "after")):
        for count in range(200):
            address = str(root / f"{act}-{when}-{count:03d}")
            child = os.fork()
            if child == 0:
                if act == "discard":
                    write(address, "encoder", "abc")
                crash_after(count, before=when == "before")
                if act == "discard":
                    ArtifactStore(address).discard("encoder", "abc")
                else:
                    write(address, "encoder", "abc")
                os._exit(0)
            if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
                break  # it was not killed: there are no more points
        else:
            raise AssertionError("a process that never ends")


def races(root: Path, rounds: int) -> None:
    """In each of `rounds` stores two processes write the same artifact without a lease and commit at one moment."""
    for number in range(rounds):
        address, gate = root / f"race-{number}", root / f"gate-{number}"
        children = []
        for who in ("first", "second"):
            child = os.fork()
            if child == 0:
                writer = ArtifactStore(str(address)).begin("encoder", "abc")
                _fill(writer, who)
                (root / f"ready-{number}-{who}").touch()
                while not gate.exists():
                    pass
                artifact = writer.commit(notes={"who": who})
                os._exit(0 if artifact.manifest.notes["who"] in ("first", "second") else 1)
            children.append(child)
        while not all((root / f"ready-{number}-{who}").exists() for who in ("first", "second")):
            time.sleep(0.001)
        gate.touch()
        if any(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children):
            raise AssertionError("a committer failed")


def hold(address: str, beat: float = BEAT) -> None:
    """Take a lease and keep it until killed."""
    lease = Lease(Objects(address), "encoder/abc", beat=beat)
    lease.acquire()
    print("held", flush=True)
    time.sleep(600)


def endless(address: str) -> None:
    """Write artifacts of a few MiB, one after the other, until killed."""
    store = ArtifactStore(address)
    for number in range(10_000):
        with store.lease("encoder", f"n{number}"):
            writer = store.begin("encoder", f"n{number}")
            for index in range(SHARDS):
                writer.put_file(f"part-{index:05d}.bin", os.urandom(2 << 20))
            writer.commit()
        print(number, flush=True)


if __name__ == "__main__":
    verb, target, *rest = sys.argv[1:]
    if verb == "crashes":
        crashes(Path(target))
    elif verb == "races":
        races(Path(target), int(rest[0]))
    else:
        {"hold": hold, "endless": endless, "beat": lambda address: hold(address, float(rest[0]))}[verb](target)
