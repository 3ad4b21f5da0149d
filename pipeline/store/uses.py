"""Who needs an artifact: the pipelines that made or read it, the runs that go on at this moment, and pins.

    .tessera/records/used/<kind>/<fingerprint>/...   one for each pipeline, stage and user: when they last needed it
    .tessera/records/pinned/<kind>/<fingerprint>     somebody wants it kept
    .tessera/records/runs/<id>                       what a run needs, for as long as its lease `runs/<id>` lives

Only the removal of artifacts asks (`tessera artifacts gc --unused`). Two pipelines of one store may need the same
artifact, and a pipeline file alone cannot say what the others need.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import socket
import time
import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

from pipeline.errors import StoreError
from pipeline.store.artifact import Artifact
from pipeline.store.lease import Lease, live_holder
from pipeline.store.objects import Objects
from pipeline.store.records import RECORDS, delete_record, read_record, record_path, records_in, write_record

USED, PINNED, RUNS = "used", "pinned", "runs"
FRESH = 3600.0  # seconds for which a use is not written anew: a cached run should cost no writes


@dataclass(frozen=True)
class Use:
    """A pipeline that made or read an artifact."""

    pipeline: str
    stage: str  # the artifact's name in that pipeline
    user: str
    host: str
    at: str  # the last time, ISO 8601, UTC

    def __str__(self) -> str:
        return f"stage '{self.stage}' of {self.whose}"

    @property
    def whose(self) -> str:
        """The pipeline, and who ran it."""
        return f"pipeline '{self.pipeline}' by {self.user}@{self.host}"


@dataclass
class Verdict:
    """What becomes of the artifacts that no named pipeline needs now."""

    unneeded: dict[tuple[str, str], str] = field(default_factory=dict)  # (kind, fingerprint) -> why it may go
    kept: dict[tuple[str, str], str] = field(default_factory=dict)  # likewise -> why it stays all the same
    of_others: set[tuple[str, str]] = field(default_factory=set)  # of `kept`: what --also-others would list


def user_name() -> str:
    """Who runs this process."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def maker(pipeline: str) -> dict[str, str]:
    """Who makes an artifact now, for its manifest."""
    return {"pipeline": pipeline, "user": user_name(), "host": socket.gethostname()}


def note_use(objects: Objects, artifact: str, pipeline: str, stage: str) -> None:
    """Remember that a pipeline needs an artifact ("kind/fingerprint"). A store that cannot be written goes without."""
    use = Use(pipeline, stage, user_name(), socket.gethostname(), datetime.now(UTC).isoformat(timespec="seconds"))
    key = hashlib.sha256("\0".join((pipeline, stage, use.user)).encode()).hexdigest()[:16]
    name = f"{USED}/{artifact}/{key}"
    with suppress(StoreError):
        found = objects.head(record_path(name))
        if found is None or time.time() - found.modified > FRESH:
            write_record(objects, name, asdict(use))


def uses(objects: Objects, artifact: str) -> list[Use]:
    """Everybody who is known to have needed an artifact, the latest first."""
    found = [Use(**value) for _, value in records_in(objects, f"{USED}/{artifact}")]
    return sorted(found, key=lambda use: use.at, reverse=True)


def last_used(objects: Objects, artifact: str) -> float:
    """When somebody last noted a use, in seconds since the epoch; 0 where nobody has."""
    return max((found.modified for found in objects.walk(f"{RECORDS}/{USED}/{artifact}")), default=0.0)


def forget_uses(objects: Objects, artifact: str) -> None:
    """Delete what is known of the uses of an artifact that is gone."""
    objects.delete_folder(f"{RECORDS}/{USED}/{artifact}")


def pin(objects: Objects, artifact: str) -> None:
    """Keep an artifact, whatever any pipeline needs.

    Raises:
        StoreError: the store cannot be written.
    """
    write_record(objects, f"{PINNED}/{artifact}", maker("") | {"at": datetime.now(UTC).isoformat(timespec="seconds")})


def unpin(objects: Objects, artifact: str) -> bool:
    """Undo `pin`; whether the artifact was pinned."""
    was = is_pinned(objects, artifact)
    delete_record(objects, f"{PINNED}/{artifact}")
    return was


def is_pinned(objects: Objects, artifact: str) -> bool:
    """Whether somebody has pinned an artifact."""
    return read_record(objects, f"{PINNED}/{artifact}") is not None


@contextmanager
def needed_while(objects: Objects, artifacts: Iterable[str]) -> Iterator[None]:
    """Keep artifacts ("kind/fingerprint"), made or not yet made, from removal for as long as the body runs.

    A store that cannot be written goes without: whoever must write it says so.
    """
    name = f"{RUNS}/{uuid.uuid4().hex[:12]}"
    lease = Lease(objects, name)
    with suppress(StoreError):
        if lease.try_acquire():
            write_record(objects, name, {"artifacts": sorted(artifacts)})
    try:
        yield
    finally:
        with suppress(StoreError):
            lease.release()
            delete_record(objects, name)


def needed_now(objects: Objects) -> set[str]:
    """The artifacts ("kind/fingerprint") that runs need which go on at this moment, on any machine."""
    return {
        artifact
        for name, value in records_in(objects, RUNS)
        if live_holder(objects, name) is not None
        for artifact in value["artifacts"]
    }


def ended_runs(objects: Objects) -> list[str]:
    """Names of the records that killed runs have left."""
    return [name for name, _ in records_in(objects, RUNS) if live_holder(objects, name) is None]


def judge(
    objects: Objects,
    artifacts: Iterable[Artifact],
    needed: Collection[tuple[str, str]],
    pipelines: Collection[str],
    *,
    also_others: bool = False,
) -> Verdict:
    """Tell which artifacts may go: those that only the named pipelines, run by this user, ever made or read.

    Args:
        objects: the store's files.
        artifacts: to judge.
        needed: (kind, fingerprint) of what the named pipelines need now.
        pipelines: their names.
        also_others: what others made or read, and what nobody is known to need, may go too.
    """
    verdict, me, running = Verdict(), user_name(), needed_now(objects)
    for artifact in artifacts:
        key = (artifact.kind, artifact.fingerprint)
        if key in needed:
            continue
        known = known_users(artifact)
        others = [use for use in known if use.pipeline not in pipelines or use.user != me]
        if is_pinned(objects, artifact.name):
            verdict.kept[key] = "pinned"
        elif artifact.name in running:
            verdict.kept[key] = "a run that goes on needs it"
        elif also_others and (others or not known):
            verdict.unneeded[key] = f"used by {others[0]}" if others else "nothing says who uses it"
        elif others or not known:
            verdict.kept[key] = f"used by {others[0].whose}" if others else "nothing says who uses it"
            verdict.of_others.add(key)
        else:
            verdict.unneeded[key] = f"{' and '.join(sorted(pipelines))}: not needed as the file is now"
    return verdict


def known_users(artifact: Artifact) -> list[Use]:
    """Who made an artifact, by its manifest, and who has needed it since; the latest first."""
    made, known = artifact.manifest.made_by, uses(artifact.objects, artifact.name)
    if made:
        use = Use(made["pipeline"], artifact.manifest.stage, made["user"], made["host"], artifact.manifest.created)
        if not any((use.pipeline, use.stage, use.user) == (k.pipeline, k.stage, k.user) for k in known):
            known.append(use)
    return known
