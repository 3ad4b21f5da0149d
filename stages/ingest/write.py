"""Candidates become shards of the `images` table: cut in key order, checked in parallel, numbered without gaps.

An image's id is the number of usable images before it, which is known only once those are decoded. So shards are
checked in parallel and written in order: small sets in this process with threads, large ones by Ray tasks, whose tables
wait in Ray's object store until their first id is known. (Ray Data has no such step: its blocks would have to pass
through the driver to get their ids.) Only a few shards are in memory at once. A shard that an earlier, killed attempt
has written is not read again.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa

from pipeline.stage import Context, interruptible, nodes
from pipeline.store.writer import ArtifactWriter
from stages.data.tables import SCHEMAS
from stages.ingest.layout import Item, Layout, Vocabulary
from stages.ingest.rows import Checked, check_all
from stages.ingest.settings import RAY_FROM, IngestConfig

_SCHEMA = SCHEMAS["images"]


@dataclass
class SplitContents:
    """What the images of one split hold: what evaluations ask of them."""

    images: int = 0
    masks: int = 0
    objects: int = 0
    mask_values: set[int] = field(default_factory=set)  # class indices
    labels: Counter[str] = field(default_factory=Counter)  # images of each label
    sequences: set[str] = field(default_factory=set)

    def add(self, other: Mapping[str, Any]) -> None:
        """Adds those of one shard, as its summary has them."""
        self.images += other["images"]
        self.masks += other["masks"]
        self.objects += other["objects"]
        self.mask_values.update(other["mask_values"])
        self.labels.update(other["labels"])
        self.sequences.update(other["sequences"])

    def to_json(self) -> dict[str, Any]:
        """The entry in the notes of a manifest."""
        return {
            "images": self.images,
            "masks": self.masks,
            "objects": self.objects,
            "labels": self.labels.total(),
            "sequences": len(self.sequences),
            "label_classes": len(self.labels),
            "mask_values": sorted(self.mask_values),
        }


@dataclass
class Shards:
    """What all shards together hold."""

    images: int = 0
    problems: list[dict[str, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    splits: dict[str, SplitContents] = field(default_factory=dict)
    skipped: set[str] = field(default_factory=set)  # keys of the candidates that cannot be used
    converted: dict[str, list[str]] = field(default_factory=dict)  # what decoding loses -> keys of the images
    unlisted: Counter[int] = field(default_factory=Counter)  # value that the label map does not list -> images

    @property
    def labels(self) -> Counter[str]:
        """Images of each label."""
        return sum((split.labels for split in self.splits.values()), Counter())

    @property
    def mask_values(self) -> set[int]:
        """The class indices in all masks."""
        return {value for split in self.splits.values() for value in split.mask_values}

    def add(self, summary: dict[str, Any]) -> None:
        """Adds the summary of one shard."""
        self.images += summary["images"]
        self.problems += summary["problems"]
        self.counts.update(summary["counts"])
        self.skipped.update(summary["skipped"])
        self.unlisted.update({int(value): count for value, count in summary["unlisted"].items()})
        for words, keys in summary["converted"].items():
            self.converted.setdefault(words, []).extend(keys)
        for name, contents in summary["splits"].items():
            self.splits.setdefault(name, SplitContents()).add(contents)

    def mask_classes(self, vocabulary: Vocabulary) -> list[str]:
        """Names of the mask values; their numbers where the source and the config name none."""
        if vocabulary.mask_classes is not None:
            return list(vocabulary.mask_classes)
        return [str(value) for value in range(max(self.mask_values, default=-1) + 1)]


def spread(items: Sequence[Item], limit: int | None) -> list[Item]:
    """All candidates in key order, or `limit` of them evenly spaced, so that every class and split keeps its share."""
    ordered = sorted(items, key=lambda item: item.key)
    if limit is None or limit >= len(ordered):
        return ordered
    return [ordered[i * len(ordered) // limit] for i in range(limit)]


def default_shard_rows(images: int) -> int:
    """Images a shard, where the config does not say."""
    return min(max(-(-images // 32), 16), 1024)


def cut(items: Sequence[Item], config: IngestConfig) -> list[list[Item]]:
    """Shards of neighbouring keys. Small sets get small shards, because later stages give each CPU whole shards."""
    rows = config.shard_rows or default_shard_rows(len(items))
    shards: list[list[Item]] = []
    size = 0
    for item in items:
        if not shards or len(shards[-1]) >= rows or size + item.size > config.shard_mb << 20:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.size
    return shards


def write_shards(context: Context, layout: Layout, vocabulary: Vocabulary, shards: Sequence[Sequence[Item]]) -> Shards:
    """Checks and writes the shards that no earlier attempt has written.

    Args:
        context: of the stage; its output keeps a record of every finished shard.
        layout: reads the candidates.
        vocabulary: the classes that labels, masks and objects refer to.
        shards: the candidates of each shard, in the order of their keys.

    Raises: SourceError at the first problem, with `on_error: fail`.
    """
    output, total = context.output, sum(len(shard) for shard in shards)
    records = output.records()
    known: dict[int, dict[str, Any]] = {}
    for index in range(len(shards)):
        record = records.get(_record_key(index))
        if record is not None and (record["images"] == 0 or output.shard_done(index) is not None):
            known[index] = record
    missing = [index for index in range(len(shards)) if index not in known]
    checker = _checker(context, layout, vocabulary, sum(len(shards[index]) for index in missing))
    checked = checker.tables([shards[index] for index in missing])
    done, seen = Shards(), 0
    for index, shard in enumerate(shards):
        summary = known.get(index)
        if summary is None:
            summary, table = next(checked)
            if summary["problems"] and layout.config.on_error == "fail":
                raise layout.error_for(summary["problems"][0])
            if summary["images"]:
                checker.write(output, index, table, done.images)
            output.record(_record_key(index), summary)
        done.add(summary)
        seen += len(shard)
        context.report_progress(seen, total, "images")
    return done


def _record_key(index: int) -> str:
    """The name of the record in which a finished shard's summary is kept."""
    return f"checked-{index:05d}"


def make_table(checked: Sequence[Checked]) -> tuple[dict[str, Any], pa.Table]:
    """The summary of one shard's candidates, and its table, which has no ids yet."""
    rows = [entry.row for entry in checked if entry.row is not None]
    schema = pa.schema([field for field in _SCHEMA if field.name != "image_id"])
    table = pa.table({name: pa.array([row[name] for row in rows], schema.field(name).type) for name in schema.names})
    summary = {
        "images": len(rows),
        "problems": [problem for entry in checked for problem in entry.problems],
        "counts": {
            "masks": sum(row["mask"] is not None for row in rows),
            "labels": sum(row["label"] is not None for row in rows),
            "objects": sum(len(row["objects"] or ()) for row in rows),
        },
        "splits": _split_contents(checked),
        "skipped": [problem["key"] for entry in checked if entry.row is None for problem in entry.problems],
        "converted": _converted(checked),
        "unlisted": Counter(str(value) for entry in checked for value in entry.unlisted),
    }
    return summary, table


def _split_contents(checked: Sequence[Checked]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for entry in checked:
        if (row := entry.row) is None:
            continue
        empty: dict[str, Any] = {
            "images": 0,
            "masks": 0,
            "objects": 0,
            "mask_values": [],
            "labels": {},
            "sequences": [],
        }
        split = found.setdefault(row["split"], empty)
        split["images"] += 1
        split["masks"] += row["mask"] is not None
        split["objects"] += len(row["objects"] or ())
        split["mask_values"] = sorted({*split["mask_values"], *entry.values})
        if row["label"] is not None:
            split["labels"][row["label"]] = split["labels"].get(row["label"], 0) + 1
        if row["sequence"] is not None and row["sequence"] not in split["sequences"]:
            split["sequences"].append(row["sequence"])
    return found


def _converted(checked: Sequence[Checked]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in checked:
        if entry.row is not None:
            for words in entry.converted:
                found.setdefault(words, []).append(entry.row["key"])
    return found


def put_numbered(output: ArtifactWriter, index: int, table: pa.Table, first_id: int) -> None:
    """Writes one shard.

    Args:
        output: the artifact.
        index: number of the shard.
        table: what `make_table` gave.
        first_id: the rows get the ids first_id, first_id + 1, ...
    """
    ids = pa.array(range(first_id, first_id + table.num_rows), pa.int64())
    output.put_table(index, table.add_column(0, _SCHEMA.field("image_id"), ids).cast(_SCHEMA))


# ---------------------------------------------------------------------------------------------- two ways to check them
class _Threads:
    """In this process, one shard after the other."""

    def __init__(self, layout: Layout, vocabulary: Vocabulary, threads: int) -> None:
        self._layout, self._vocabulary, self._threads = layout, vocabulary, threads

    def tables(self, shards: Sequence[Sequence[Item]]) -> Iterator[tuple[dict[str, Any], Any]]:
        for shard in shards:
            yield make_table(check_all(self._layout, self._vocabulary, shard, self._threads))

    def write(self, output: ArtifactWriter, index: int, table: Any, first_id: int) -> None:
        put_numbered(output, index, table, first_id)


class _RayTasks:
    """One task a shard, a few ahead of the one that is written; tables never pass through this process."""

    def __init__(self, layout: Layout, vocabulary: Vocabulary, ahead: int, cpus: float) -> None:
        import ray

        self._ray, self._ahead = ray, ahead
        self._what = ray.put((layout, vocabulary))
        self._check = ray.remote(num_returns=2, num_cpus=cpus)(_check_remote)
        self._write = ray.remote(num_cpus=cpus)(put_numbered)

    def tables(self, shards: Sequence[Sequence[Item]]) -> Iterator[tuple[dict[str, Any], Any]]:
        waiting = iter(shards)
        running: deque[tuple[Any, Any]] = deque()
        while True:
            while len(running) < self._ahead and (shard := next(waiting, None)) is not None:
                summary, table = self._check.remote(self._what, list(shard))
                running.append((summary, table))
            if not running:
                return
            summary, table = running.popleft()
            yield self._get(summary), table

    def write(self, output: ArtifactWriter, index: int, table: Any, first_id: int) -> None:
        self._get(self._write.remote(output, index, table, first_id))

    def _get(self, reference: Any) -> Any:
        try:
            return interruptible(partial(self._ray.get, reference))
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause or error from None


def _check_remote(what: tuple[Layout, Vocabulary], items: list[Item]) -> tuple[dict[str, Any], pa.Table]:
    layout, vocabulary = what
    return make_table(check_all(layout, vocabulary, items, threads=1))


def _checker(context: Context, layout: Layout, vocabulary: Vocabulary, images: int) -> _Threads | _RayTasks:
    if images >= RAY_FROM:
        import ray

        if ray.is_initialized():
            cpus = context.resources.cpus or 1.0
            slots = max(int(sum(node.get("CPU", 0) for node in nodes()) / cpus), 1)
            return _RayTasks(layout, vocabulary, (context.resources.concurrency or slots) + 2, cpus)
    return _Threads(layout, vocabulary, min(os.cpu_count() or 1, 8))
