"""Reads rows of an artifact's table from its Parquet shards: one slice, some ids, or a spread sample; always streamed.

For reading a table once, in order. Random access by id, again and again, is `stages.data.tables.Table`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact
    from pipeline.store.manifest import FileEntry
    from pipeline.store.writer import ArtifactWriter

    Readable = Artifact | ArtifactWriter

_BATCH_ROWS = 16  # rows decoded from Parquet at once: of photographs a few MB


def read_shard(artifact: Readable, shard: FileEntry, columns: Sequence[str] | None = None) -> pa.Table:
    """One whole shard, verified against the manifest. Raises ArtifactDamaged."""
    return pq.read_table(artifact.local(shard.name), columns=None if columns is None else list(columns))


def iter_batches(
    artifact: Readable,
    shard: FileEntry,
    columns: Sequence[str] | None = None,
    *,
    start: int = 0,
    stop: int | None = None,
    batch_rows: int = _BATCH_ROWS,
) -> Iterator[pa.RecordBatch]:
    """Streams the rows [start, stop) of one shard; memory stays at a few batches whatever the size of the shard.

    Args:
        artifact: whose table is read.
        shard: one of `artifact.shards()`; it is verified before the first row.
        columns: names; default: all.
        start: the first row, counted from the shard's beginning.
        stop: the row behind the last one; default: the shard's end.
        batch_rows: rows of a batch; batches at the ends of the slice and of a row group are shorter.

    Raises: ArtifactDamaged.
    """
    with pq.ParquetFile(artifact.local(shard.name), pre_buffer=False) as file:
        stop = file.metadata.num_rows if stop is None else stop
        groups, first, at = [], 0, 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if at + size <= start:
                first = at + size
            elif at < stop:
                groups.append(group)
            at += size
        at = first
        for batch in file.iter_batches(batch_rows, row_groups=groups, columns=columns and list(columns)):
            low, high = max(start - at, 0), min(stop - at, batch.num_rows)
            if low < high:
                yield batch.slice(low, high - low)
            at += batch.num_rows
            if at >= stop:
                return


def iter_rows(
    artifact: Artifact, columns: Sequence[str], *, ids: Collection[int] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of a whole artifact in the order of their ids, each with `image_id` and `columns`.

    `ids` keeps those images only: shards that hold none of them are read no further than their ids.
    Raises: ArtifactDamaged.
    """
    if ids is None:
        for shard in artifact.shards():
            yield from slice_rows(artifact, shard, columns, 0, shard.rows or 0)
    else:
        yield from (one.to_pylist()[0] for one in iter_single(artifact, columns, ids))


def iter_single(artifact: Artifact, columns: Sequence[str], ids: Collection[int]) -> Iterator[pa.RecordBatch]:
    """The rows of these images as `iter_rows` gives them, each a batch of one row: without a Python object a number.

    Raises: ArtifactDamaged.
    """
    for shard in artifact.shards():
        held = read_shard(artifact, shard, ["image_id"])["image_id"].to_pylist()
        yield from _single_at(artifact, shard, columns, [row for row, image_id in enumerate(held) if image_id in ids])


def slice_rows(
    artifact: Readable, shard: FileEntry, columns: Sequence[str], start: int, stop: int
) -> Iterator[dict[str, Any]]:
    """The rows [start, stop) of one shard, each with `image_id` and `columns`. Raises ArtifactDamaged."""
    for batch in iter_batches(artifact, shard, _with_id(columns), start=start, stop=stop):
        yield from batch.to_pylist()


def sample_rows(artifact: Readable, count: int, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Up to `count` rows spread evenly over an artifact, always the same ones: for previews. Raises ArtifactDamaged.

    Of an artifact in the making, the rows of the shards that are finished.
    """
    ends = np.cumsum([0, *(shard.rows or 0 for shard in artifact.shards())])
    wanted = np.unique(np.linspace(0, ends[-1] - 1, min(count, ends[-1])).astype(int))
    for index, shard in enumerate(artifact.shards()):
        inside = wanted[(wanted >= ends[index]) & (wanted < ends[index + 1])] - ends[index]
        yield from (one.to_pylist()[0] for one in _single_at(artifact, shard, columns, inside.tolist()))


def _single_at(
    artifact: Readable, shard: FileEntry, columns: Sequence[str], rows: Sequence[int]
) -> Iterator[pa.RecordBatch]:
    """These rows of a shard, in rising order, in one pass over the rows between the first and the last."""
    if not rows:
        return
    names, at, left = _with_id(columns), rows[0], set(rows)
    for batch in iter_batches(artifact, shard, names, start=rows[0], stop=rows[-1] + 1):
        for row in range(at, at + batch.num_rows):
            if row in left:
                yield batch.slice(row - at, 1)
        at += batch.num_rows


def _with_id(columns: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(["image_id", *columns]))
