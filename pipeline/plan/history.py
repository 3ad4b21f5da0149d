"""How a stage differs from what it was when it was last run: the reasons that a plan gives."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import re
from typing import TYPE_CHECKING, Any, TypedDict

from pipeline.errors import StoreError
from pipeline.plan.fingerprint import Identity

if TYPE_CHECKING:
    from pipeline.store.store import ArtifactStore


NEW_FORMAT = "fingerprints are made in a new way"


class Entry(TypedDict):
    """One stage of one pipeline, as a run last computed it or found it cached."""

    fingerprint: str
    identity: Identity
    inputs: dict[str, str]  # dotted field path -> stage name
    sources: dict[str, str]  # dotted field path -> address, as written


def recall(store: ArtifactStore, pipeline: str, stage: str) -> Entry | None:
    """The last known state; None when the stage was never run under this name in this store."""
    found = store.read_record(_record(pipeline, stage))
    if found is None or not found.keys() >= Entry.__annotations__.keys():
        return None
    if not isinstance(found["identity"], dict) or not found["identity"].keys() >= Identity.__annotations__.keys():
        return None
    return Entry(**found)  # type: ignore[typeddict-item]


def remember(store: ArtifactStore, pipeline: str, stage: str, entry: Entry) -> None:
    """Keep the state of a stage whose artifact is there. Without it a plan lacks reasons, and nothing else."""
    with contextlib.suppress(StoreError):
        if recall(store, pipeline, stage) != entry:
            store.write_record(_record(pipeline, stage), dict(entry))


def differences(stage: str, old: Entry, new: Entry) -> list[str]:
    """Why a stage has another fingerprint, in the user's words.

    For example "stages.superpixels.region_size 20 -> 16", "input scenes changed", "source data/scenes changed",
    "version 1 -> 2", "opencv-contrib-python-headless 5.0 -> 5.1".

    Args:
        stage: its name.
        old: what it was when it last ran.
        new: what it is now.

    Returns:
        At least one reason when the fingerprints differ.
    """
    before, now = old["identity"], new["identity"]
    if before["format"] != now["format"]:
        return [NEW_FORMAT]
    if before["uses"] != now["uses"]:
        return [f"stages.{stage}.uses {before['uses']} -> {now['uses']}"]
    reasons = _changed(_as_written(old, new), _as_written(new, new), f"stages.{stage}")
    for word, names, was, is_now in (
        ("input", (old["inputs"], new["inputs"]), before["inputs"], now["inputs"]),
        ("source", (old["sources"], new["sources"]), before["sources"], now["sources"]),
    ):
        for path, name in names[1].items():
            if name == names[0].get(path) and was.get(path) != is_now.get(path):
                reasons.append(f"{word} {name} changed")
    reasons = list(dict.fromkeys(reasons))  # two fields may read one stage
    if before["version"] != now["version"]:
        reasons.append(f"version {before['version']} -> {now['version']}")
    for name in sorted(before["packages"].keys() | now["packages"].keys()):
        old_version, new_version = (side["packages"].get(name, "not counted") for side in (before, now))
        if old_version != new_version:
            reasons.append(f"{name} {old_version} -> {new_version}")
    if not reasons and old["fingerprint"] != new["fingerprint"]:
        reasons.append(NEW_FORMAT)
    return reasons


def _changed(old: Any, new: Any, path: str) -> list[str]:
    """The values that differ between two settings, in the order of the new ones."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*new, *(key for key in old if key not in new)]
        return [
            reason for key in keys for reason in _changed(old.get(key, _UNSET), new.get(key, _UNSET), f"{path}.{key}")
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [reason for i, (was, now) in pairs for reason in _changed(was, now, f"{path}.{i}")]
    return [f"{path} {_shown(old)} -> {_shown(new)}"] if old != new or type(old) is not type(new) else []


def _as_written(entry: Entry, newer: Entry) -> Any:
    """An entry's settings, with the names of stages and the addresses of sources put back in their places.

    A stage that was renamed, or a source that was moved, and is otherwise the same, makes no difference: the newer
    name is put into both entries.
    """
    settings = copy.deepcopy(entry["identity"]["settings"])
    for names, newer_names, ours, theirs in (
        (entry["inputs"], newer["inputs"], entry["identity"]["inputs"], newer["identity"]["inputs"]),
        (entry["sources"], newer["sources"], entry["identity"]["sources"], newer["identity"]["sources"]),
    ):
        for path, name in names.items():
            if path in ours:  # it is missing where the field does not belong to the fingerprint
                same = ours[path] == theirs.get(path)
                _put(settings, path.split("."), newer_names.get(path, name) if same else name)
    return settings


def _put(settings: Any, path: list[str], name: str) -> None:
    *parents, last = path
    for key in parents:
        settings = settings[int(key)] if isinstance(settings, list) else settings.setdefault(key, {})
    if isinstance(settings, list):
        settings[int(last)] = name
    else:
        settings[last] = name


class _Unset:
    def __repr__(self) -> str:
        return "unset"


_UNSET = _Unset()


def _shown(value: Any) -> str:
    """As YAML would write it, on one line that is not too long."""
    if isinstance(value, bool) or value is None:
        text = {True: "true", False: "false", None: "null"}[value]
    elif isinstance(value, dict):
        text = "{" + ", ".join(f"{key}: {_shown(item)}" for key, item in value.items()) + "}"
    elif isinstance(value, list):
        text = "[" + ", ".join(map(_shown, value)) + "]"
    else:
        text = str(value) if value != "" else "''"
    return text if len(text) <= 60 else text[:57] + "..."


def _record(pipeline: str, stage: str) -> str:
    """A record's name without spaces and slashes, which a pipeline's name may hold, and without collisions."""
    tail = hashlib.sha256(f"{pipeline}\0{stage}".encode()).hexdigest()[:12]
    return f"history-{re.sub(r'[^a-z0-9_-]+', '-', f'{pipeline}-{stage}'.lower())[:60]}-{tail}"
