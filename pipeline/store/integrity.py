"""Whether an artifact still holds what its manifest says: `check` looks at it, `verify` reads all of it again.

A file's tag changes whenever the file does (on a disk: inode, size and times; in a bucket: the etag). A check trusts
a file that still has the tag with which its content was last found to be right. The memo in the store holds these
tags; when it is lost, the next check reads the files once.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import suppress

from pipeline.errors import ArtifactDamaged, StoreError
from pipeline.progress import ProgressCallback
from pipeline.store.artifact import Artifact, Damage, load
from pipeline.store.local_cache import WRONG_CONTENT, wrong_size
from pipeline.store.manifest import MANIFEST, FileEntry
from pipeline.store.objects import GRAIN_NS, Objects, StoredObject
from pipeline.store.sealed import SealBroken, seal, unseal

MEMOS = ".tessera/memo"


def memo_path(artifact: str) -> str:
    """Where the memo of an artifact is, relative to the store."""
    return f"{MEMOS}/{artifact}.json"


def check(artifact: Artifact) -> list[Damage]:
    """Damaged files. One listing when nothing was touched; files with an unknown tag are read."""
    known = _read_memo(artifact)
    damages, fresh = _compare(artifact, lambda entry, found: known.get(entry.stored) == found.tag, None)
    if fresh != known:
        write_memo(artifact, fresh)
    return damages


def verify(artifact: Artifact, report_progress: ProgressCallback | None = None) -> list[Damage]:
    """Damaged files, after reading every file and the manifest again."""
    damages, fresh = _compare(artifact, lambda entry, found: False, report_progress)
    try:
        again = load(artifact.objects, artifact.kind, artifact.fingerprint)
        if again is None:
            damages.append(Damage(artifact.name, MANIFEST, "it is missing"))
    except ArtifactDamaged as error:
        damages.append(Damage(artifact.name, error.file, error.reason))
    write_memo(artifact, fresh)
    return damages


def _compare(
    artifact: Artifact, trusted: Callable[[FileEntry, StoredObject], bool], report_progress: ProgressCallback | None
) -> tuple[list[Damage], dict[str, str]]:
    """Damaged files, and the tags of the others that are old enough for their tag to be trusted."""
    prefix = f"{artifact.name}/"
    listing = {found.path.removeprefix(prefix): found for found in artifact.objects.walk(artifact.name)}
    damages, tags, done = [], {}, 0
    for entry in artifact.manifest.files:
        found = listing.get(entry.stored)
        reason = _reason(artifact.objects, prefix, entry, found, bool(found and trusted(entry, found)))
        if reason:
            damages.append(Damage(artifact.name, entry.stored, reason))
        elif found is not None and found.changed_ns < time.time_ns() - GRAIN_NS:
            tags[entry.stored] = found.tag
        done += entry.size
        if report_progress is not None:
            report_progress(done, artifact.bytes, "bytes")
    return damages, tags


def _reason(objects: Objects, prefix: str, entry: FileEntry, found: StoredObject | None, trusted: bool) -> str:
    if found is None:
        return "it is missing"
    if found.size != entry.size:
        return wrong_size(found.size, entry)
    return "" if trusted else content_reason(objects, prefix + entry.stored, entry)


def content_reason(objects: Objects, path: str, entry: FileEntry) -> str:
    """Why a stored file's content is not what its entry says, or "". Reads all of it."""
    digest, size = hashlib.sha256(), 0
    try:
        for block in objects.stream(path):
            digest.update(block)
            size += len(block)
    except FileNotFoundError:
        return "it is missing"
    except StoreError as error:
        return f"it cannot be read: {error}"
    if size != entry.size:
        return wrong_size(size, entry)
    return "" if digest.hexdigest() == entry.sha256 else WRONG_CONTENT


def _read_memo(artifact: Artifact) -> dict[str, str]:
    data = artifact.objects.get(memo_path(artifact.name))
    try:
        memo = unseal(data) if data else {}
    except SealBroken:
        return {}
    return dict(memo["files"]) if memo.get("manifest") == artifact.manifest.checksum else {}


def write_memo(artifact: Artifact, tags: dict[str, str]) -> None:
    """Keep the tags of files that were found to be right. A store that cannot be written goes without."""
    memo = {"manifest": artifact.manifest.checksum, "files": tags}
    with suppress(StoreError):
        artifact.objects.put(memo_path(artifact.name), seal(memo), durable=False)
