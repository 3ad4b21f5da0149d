"""What a store's failure means to the user: the broken rule, the address and the remedy in one sentence."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import StoreError


@dataclass(frozen=True)
class Meaning:
    """A regular expression for the cause's text, the rule that such a cause breaks, and what to do about it."""

    pattern: str
    rule: str
    remedy: str


_ROOM = "free space (`tessera artifacts gc`), or name a store on another disk"

# The first entry that matches is used. obstore writes "os error 13", Python writes "Errno 13".
_LOCAL = (
    Meaning(
        r"\b(os error|Errno) (1|13)\b",
        "this user may not {doing} there",
        "change its owner or its mode, or name another store",
    ),
    Meaning(r"\b(os error|Errno) 30\b", "its file system is read-only", "name a store on a disk that can be written"),
    Meaning(r"\b(os error|Errno) 28\b", "its disk is full{room}", _ROOM),
    Meaning(r"\b(os error|Errno) 122\b", "the disk quota is used up{room}", _ROOM),
    Meaning(
        r"\b(os error|Errno) 27\b",
        "a file would be larger than is allowed there",
        "raise the limit, `ulimit -f`, or name a store on another disk",
    ),
    Meaning(r"\b(os error|Errno) (17|20)\b", "a part of its path is a file, not a folder", "name a folder"),
    Meaning(r"\b(os error|Errno) 2\b", "its folder cannot be made", "name a folder that can be made"),
    Meaning(r"\b(os error|Errno) 5\b", "the disk reports an error", "check the disk; recompute what it held"),
)
_REMOTE = (
    Meaning(
        r"NoSuchBucket|ContainerNotFound|bucket does not exist|container does not exist",
        "there is no such bucket",
        "create the bucket, or correct the address",
    ),
    Meaning(
        r"169\.254\.|metadata\.google|(?i:credential provider|missing ?credentials|no credentials)|Account must be",
        "there are no credentials for it",
        "set {environment}",
    ),
    Meaning(
        r"RequestTimeTooSkewed",
        "this machine's clock differs from the server's by too much",
        "set the clock, for instance with an NTP service",
    ),
    Meaning(
        r"InvalidAccessKeyId|SignatureDoesNotMatch|status code: 40[13]\b|AccessDenied|Forbidden|Unauthorized",
        "access is denied",
        "check {environment}, and that they may {doing} there",
    ),
    Meaning(
        r"(?i:scheme is not allowed|BadScheme)",
        "its endpoint is http://, and only https:// is allowed",
        "set AWS_ALLOW_HTTP=true, or use an https:// endpoint",
    ),
    Meaning(
        r"NotImplemented|status code: 501\b",
        "the server does not know conditional writes, which commit an artifact",
        "use a server that supports If-None-Match and If-Match",
    ),
    Meaning(
        r"SlowDown|ServerBusy|status code: (429|503)\b",
        "it asks for fewer requests, or is overloaded (status 503)",
        "run the same command again later, with fewer workers: what is finished is kept",
    ),
    Meaning(
        r"status code: 5\d\d\b",
        "the server fails (status 5xx)",
        "ask who runs it, then run the same command again: what is finished is kept",
    ),
    Meaning(
        r"(?i:request or response body|decoding response body|connection (closed|reset))",
        "the connection breaks",
        "check the network, then run the same command again: what is finished is kept",
    ),
    Meaning(
        r"(?i:error sending request|connect|dns|timed out|timeout)",
        "it cannot be reached",
        "check the network and the endpoint (AWS_ENDPOINT_URL for s3://)",
    ),
)
_ENVIRONMENT = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
}


def explain(
    error: Exception, address: str, doing: str, path: str, tried: str = "", needed: int | None = None
) -> StoreError:
    """The StoreError for a failed access to a store.

    Args:
        error: what obstore or the system raised.
        address: of the store.
        doing: what was tried, as a verb: "read", "write", "list", ...
        path: of the object within the store; "" for the store itself.
        tried: how often and for how long, where it was tried more than once.
        needed: bytes that were to be written, where that is known.
    """
    cause = str(error)
    room = "" if "://" in address else room_at(Path(address), needed)
    words = {"doing": doing, "environment": _ENVIRONMENT.get(address.split("://", 1)[0], ""), "room": room}
    place, often = f"store {address}: cannot {doing} {path or 'it'}", f", {tried}" if tried else ""
    for meaning in _REMOTE if "://" in address else _LOCAL:
        if re.search(meaning.pattern, cause):
            return StoreError(f"{place}: {meaning.rule.format(**words)}{often} ({meaning.remedy.format(**words)})")
    first = cause.strip().splitlines()[0][:300] if cause.strip() else type(error).__name__
    return StoreError(f"{place}: {first}{often} (`tessera doctor` checks the store)")


def room_at(folder: Path, needed: int | None) -> str:
    """The end of a message about a full disk, ", 3.0 MiB needed, 0.2 MiB free"; "" where nothing is known."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with contextlib.suppress(OSError):
        disk = os.statvfs(folder)
        free = f", {disk.f_bavail * disk.f_frsize / 2**20:.1f} MiB free"
        return (f", {needed / 2**20:.1f} MiB needed" if needed is not None else "") + free
    return ""
