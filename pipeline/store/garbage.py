"""Collects garbage: what a killed run left behind, and the artifacts that somebody has asked to remove.

What is leased, what a live attempt writes, what a run needs that goes on, and what is pinned, stays. The collector
holds an artifact's lease while it deletes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from pipeline.errors import ArtifactDamaged
from pipeline.store.artifact import Artifact, load
from pipeline.store.attempt import live_attempts
from pipeline.store.integrity import memo_path
from pipeline.store.lease import Holder, Lease, live_holder
from pipeline.store.manifest import MANIFEST
from pipeline.store.objects import Objects, StoredObject
from pipeline.store.records import RECORDS, record_path
from pipeline.store.uses import USED, ended_runs, forget_uses, is_pinned, known_users, last_used, needed_now
from pipeline.store.writer import local_progress_folder, scratch_attempt, scratch_root


@dataclass(frozen=True)
class Removed:
    """One thing that was, or in a dry run would be, removed."""

    path: str  # relative to the store
    bytes: int
    reason: str
    artifact: tuple[str, str] | None = None  # kind and fingerprint, of a finished one that can be read
    made_by: str = ""  # of an artifact: stage, pipeline, user and host, as far as they are known
    made: str = ""  # likewise: when, ISO 8601, UTC

    def __str__(self) -> str:
        return f"{self.path} ({self.reason})"


def collect(
    objects: Objects,
    folders: Iterable[tuple[str, str]],
    unneeded: Mapping[tuple[str, str], str],
    *,
    older_than: timedelta,
    dry_run: bool,
) -> list[Removed]:
    """Remove what no artifact needs; see `ArtifactStore.gc`.

    Args:
        objects: the store's files.
        folders: (kind, fingerprint) of every folder in an artifact's place, committed or not.
        unneeded: (kind, fingerprint) of finished artifacts to remove -> why.
        older_than: what was touched or used more recently stays.
        dry_run: only list what would go.
    """
    before = time.time() - older_than.total_seconds()
    removed: list[Removed] = []
    for kind, fingerprint in folders:
        removed += _collect_artifact(objects, kind, fingerprint, unneeded, before, dry_run)
    removed += _collect_leases(objects, dry_run)
    removed += _collect_runs(objects, before, dry_run)
    removed += _collect_memos(objects, before, dry_run)
    removed += _collect_uses(objects, before, dry_run)
    removed += _collect_scratch(objects, before, dry_run)
    return removed


def delete_artifact(objects: Objects, name: str) -> None:
    """Delete everything of one artifact, the manifest first: without it nobody reads the rest."""
    objects.delete([f"{name}/{MANIFEST}"])
    objects.delete([memo_path(name)])
    objects.delete_folder(name)
    objects.delete_folder(f"{name}.progress")
    if objects.folder is None:
        shutil.rmtree(local_progress_folder(objects, name), ignore_errors=True)


def _collect_artifact(
    objects: Objects, kind: str, fingerprint: str, unneeded: Mapping[tuple[str, str], str], before: float, dry_run: bool
) -> list[Removed]:
    name = f"{kind}/{fingerprint}"
    if not any(_garbage(objects, kind, fingerprint, unneeded, before)):
        return []
    if live_holder(objects, name) is not None or live_attempts(objects, name):
        return []
    if dry_run:
        return [removed for removed, _ in _garbage(objects, kind, fingerprint, unneeded, before)]
    lease = Lease(objects, name)
    if not lease.try_acquire():
        return []
    try:
        # Looked at again under the lease: somebody may have continued, or committed, a moment ago.
        found = [] if live_attempts(objects, name) else list(_garbage(objects, kind, fingerprint, unneeded, before))
        for removed, paths in found:
            if removed.path == name:
                delete_artifact(objects, name)
                forget_uses(objects, name)
            elif paths:
                objects.delete(paths)
            else:
                objects.delete_folder(removed.path)
        return [removed for removed, _ in found]
    finally:
        lease.release()


def _garbage(
    objects: Objects, kind: str, fingerprint: str, unneeded: Mapping[tuple[str, str], str], before: float
) -> Iterator[tuple[Removed, list[str]]]:
    """What to remove of one artifact's folders: (item, its objects). No objects means the whole folder."""
    name = f"{kind}/{fingerprint}"
    files, progress = objects.walk(name), objects.walk(f"{name}.progress")
    size = sum(found.size for found in files + progress)
    young = any(found.modified > before for found in files + progress)
    try:
        artifact: Artifact | None = load(objects, kind, fingerprint)
    except ArtifactDamaged:
        if not young:
            yield Removed(name, size, "its manifest is broken"), []
        return
    if artifact is None:
        if not young:
            yield Removed(name, size, "never committed"), []
        return
    why = unneeded.get((kind, fingerprint))
    if why and not young and last_used(objects, name) <= before and not _wanted(objects, name):
        made = next((str(use) for use in known_users(artifact)[::-1]), f"stage '{artifact.manifest.stage}'")
        yield Removed(name, size, why, (kind, fingerprint), made, artifact.manifest.created), []
        return
    wanted = {f"{name}/{entry.stored}" for entry in artifact.manifest.files} | {f"{name}/{MANIFEST}"}
    for found in _old(files, before):
        if found.path not in wanted:
            yield Removed(found.path, found.size, "not in the manifest"), [found.path]
    if not any(found.modified > before for found in progress) and _folder_there(objects, f"{name}.progress"):
        size = sum(found.size for found in progress)
        yield Removed(f"{name}.progress", size, "its artifact is finished"), []


def _wanted(objects: Objects, name: str) -> bool:
    """Whether an artifact must stay whatever was asked. Looked up as late as possible: a run may just have begun."""
    return is_pinned(objects, name) or name in needed_now(objects)


def _old(files: list[StoredObject], before: float) -> list[StoredObject]:
    return [found for found in files if found.modified <= before]


def _folder_there(objects: Objects, path: str) -> bool:
    kind, name = path.split("/")
    return name in objects.folders(kind)


def _collect_leases(objects: Objects, dry_run: bool) -> list[Removed]:
    removed = []
    for found in objects.walk(".tessera/leases"):
        if not found.path.endswith(".json"):
            continue
        holder = Holder.from_bytes(objects.get(found.path) or b"")
        if holder is not None and holder.long_gone():
            removed.append((Removed(found.path, found.size, "its process is dead"), holder))
    if not dry_run:
        for item, _ in removed:
            lease = Lease(objects, item.path.removeprefix(".tessera/leases/").removesuffix(".json"))
            if lease.try_acquire():  # taken over and given back: deleting the file could hit a new holder
                lease.release()
    return [item for item, _ in removed]


def _collect_runs(objects: Objects, before: float, dry_run: bool) -> list[Removed]:
    """What killed runs have noted that they need. A young one may be of a run that is just taking its lease."""
    ended = [objects.head(record_path(name)) for name in ended_runs(objects)]
    paths = [found.path for found in ended if found is not None and found.modified <= before]
    if not dry_run:
        objects.delete(paths)
    return [Removed(path, 0, "its run has ended") for path in paths]


def _collect_memos(objects: Objects, before: float, dry_run: bool) -> list[Removed]:
    removed = []
    for found in _old(objects.walk(".tessera/memo"), before):
        name = found.path.removeprefix(".tessera/memo/").removesuffix(".json")
        if objects.get(f"{name}/{MANIFEST}") is None:
            removed.append(Removed(found.path, found.size, "its artifact is gone"))
    if not dry_run:
        objects.delete([item.path for item in removed])
    return removed


def _collect_uses(objects: Objects, before: float, dry_run: bool) -> list[Removed]:
    """Who used an artifact that somebody has deleted since."""
    by_artifact: dict[str, list[StoredObject]] = {}
    for found in objects.walk(f"{RECORDS}/{USED}"):
        folder = found.path.rpartition("/")[0]
        by_artifact.setdefault(folder.removeprefix(f"{RECORDS}/{USED}/"), []).append(found)
    removed, running = [], needed_now(objects)  # a run may be making the artifact anew
    for name, notes in by_artifact.items():
        gone = name not in running and objects.get(f"{name}/{MANIFEST}") is None
        if gone and len(_old(notes, before)) == len(notes):
            size = sum(found.size for found in notes)
            removed.append(Removed(f"{RECORDS}/{USED}/{name}", size, "its artifact is gone"))
            if not dry_run:
                forget_uses(objects, name)
    return removed


def _collect_scratch(objects: Objects, before: float, dry_run: bool) -> list[Removed]:
    """Scratch folders of attempts that no longer live, on this machine's disk or in a store that machines share."""
    removed = []
    root = scratch_root(objects)
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if not folder.is_dir() or _scratch_in_use(objects, folder, before):
            continue
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        shown = folder.relative_to(objects.folder) if objects.folder is not None else folder
        removed.append(Removed(str(shown), size, "scratch of a dead process"))
        if not dry_run:
            shutil.rmtree(folder, ignore_errors=True)
    return removed


def _scratch_in_use(objects: Objects, folder: Path, before: float) -> bool:
    attempt = scratch_attempt(objects, folder)
    if attempt is not None and attempt.is_live():
        return True
    try:
        return max(path.stat().st_mtime for path in [folder, *folder.rglob("*")]) > before
    except FileNotFoundError:  # somebody is writing, or deleting, in it
        return True
