"""What Ray's workers do with a slice of images: read its rows, compute them, and write the shard once it is whole.

What passes between the steps is a plain Arrow row for each slice: `SLICES` in, `results_schema` after the computation,
`DONE` after the shard is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import cv2
import pyarrow as pa

from pipeline.errors import StageFailed
from stages.data.ahead import in_batches, prepare_ahead
from stages.data.images import ImageError
from stages.data.rows import slice_rows
from stages.map_images.slices import Slice

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact
    from pipeline.store.writer import ArtifactWriter

Row: TypeAlias = dict[str, Any]
_PACK_ROWS = 256  # rows that wait as Python objects, ten times the size of the same in Arrow

SLICES = pa.schema([("shard", pa.int64()), ("start", pa.int64()), ("stop", pa.int64())])
DONE = SLICES  # a slice whose shard is written, or whose shard still waits for its other slices


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know; travels to it once.

    Attributes:
        images: the artifact that is read.
        shards: of the output: which rows of which shard of the images each is made from.
        output: where shards are written.
        schema: of the output table.
        columns: of an images row that `process` asks for.
        process: a function of one row, or a class whose instances take a list of rows.
        arguments: further ones of the function, or those of the class.
        prepare: runs in threads ahead of an instance.
        batch_rows: rows that an instance takes at once.
        threads: that prepare.
    """

    images: Artifact
    shards: tuple[Slice, ...]
    output: ArtifactWriter
    schema: pa.Schema
    columns: tuple[str, ...]
    process: Callable[..., Any]
    arguments: tuple[Any, ...]
    prepare: Callable[[Row], Row] | None
    batch_rows: int
    threads: int


def results_schema(job: Job) -> pa.Schema:
    """One row per computed slice: which one, what was counted and what failed in it, and its rows of the output."""
    problem = pa.struct([("key", pa.string()), ("reason", pa.string())])
    return pa.schema(
        [
            *SLICES,
            ("counts", pa.map_(pa.string(), pa.int64())),
            ("problems", pa.list_(problem)),
            ("rows", pa.list_(pa.struct(list(job.schema)))),
        ]
    )


def run_slice(one: pa.Table, job: Job) -> pa.Table:
    """Computes a slice, `process` being a function. A row of `SLICES` -> one of `results_schema`."""
    cv2.setNumThreads(1)  # the workers are the parallelism; OpenCV's own threads would fight them
    return _results(one, job, ((row, _attempt(job, row)) for row in _read(one, job)))


def run_shard(one: pa.Table, job: Job) -> pa.Table:
    """The same where the slice is a whole shard, which is then written."""
    return write_shard(run_slice(one, job), job)


class SliceActor:
    """Keeps one instance of the class `process` (a model, say) for all slices that come to it."""

    def __init__(self, job: Job) -> None:
        cv2.setNumThreads(1)
        self.job = job
        self.failure: Exception | None = None
        try:
            self.instance = job.process(*job.arguments)
        except (
            Exception
        ) as error:  # raised by the first slice: of what an actor's start raises, Ray keeps the text only
            self.failure = error

    def __call__(self, one: pa.Table) -> pa.Table:
        """A row of `SLICES` -> one of `results_schema`."""
        if self.failure is not None:
            raise self.failure
        return _results(one, self.job, _by_batches(_read(one, self.job), self.job, self.instance))


class ShardActor(SliceActor):
    """The same where every slice is a whole shard, which is then written."""

    def __call__(self, one: pa.Table) -> pa.Table:
        """A row of `SLICES` -> one of `DONE`."""
        return write_shard(super().__call__(one), self.job)


def write_shard(results: pa.Table, job: Job) -> pa.Table:
    """Writes the shard that these slices make, in their order. Rows of `results_schema` -> as many of `DONE`.

    Raises: StageFailed when they are not the slices of one shard.
    """
    done = results.select(DONE.names)
    slices = done.to_pylist()
    [shard, *others] = {one["shard"] for one in slices}
    gaps = any(one["stop"] != following["start"] for one, following in pairwise([{"stop": 0}, *slices]))
    if others or gaps:
        raise StageFailed(f"Ray Data put slices together that are not one shard: {slices} (an error in Tessera)")
    tables = [pa.Table.from_arrays(chunk.flatten().flatten(), schema=job.schema) for chunk in results["rows"].chunks]
    table = pa.concat_tables(tables).combine_chunks()  # the same bytes, however the shard was cut
    counts: Counter[str] = Counter()
    for counted in results["counts"].to_pylist():
        counts.update(dict(counted))
    problems = [problem for failed in results["problems"].to_pylist() for problem in failed]
    record = {"images": table.num_rows, "counts": dict(counts), "problems": problems}
    # The record first: a shard without one was written by nobody who counted, and is computed again.
    job.output.record(record_name(shard), record)
    job.output.put_table(shard, table)
    return done


def record_name(shard: int) -> str:
    """The name of the record that says what was counted in a shard."""
    return f"shard-{shard:05d}"


def _read(one: pa.Table, job: Job) -> Iterator[Row]:
    [wanted] = one.to_pylist()
    source = job.shards[wanted["shard"]]
    shard = next(islice(job.images.shards(), source.shard, None))
    return slice_rows(job.images, shard, job.columns, source.start + wanted["start"], source.start + wanted["stop"])


def _attempt(job: Job, row: Row) -> Row | Exception:
    """The result, or the exception: one image's failure is a value here."""
    try:
        result: Row = job.process(row, *job.arguments)
    except Exception as error:
        return error
    return result


def _by_batches(
    rows: Iterator[Row], job: Job, instance: Callable[[list[Row]], list[Row | Exception]]
) -> Iterator[tuple[Row, Row | Exception]]:
    """Batches of prepared rows through the instance, the next batch being prepared meanwhile."""
    prepared = prepare_ahead(rows, job.prepare or (lambda row: row), threads=job.threads, ahead=job.batch_rows)
    for batch in in_batches(prepared, job.batch_rows):
        usable = [row for _, row in batch if not isinstance(row, Exception)]
        results = instance(usable) if usable else []
        if len(results) != len(usable):
            raise StageFailed(f"{type(instance).__name__} gave {len(results)} rows for {len(usable)} images")
        given = iter(results)
        for row, ready in batch:
            yield row, ready if isinstance(ready, Exception) else next(given)


def _results(one: pa.Table, job: Job, computed: Iterator[tuple[Row, Row | Exception]]) -> pa.Table:
    """The row of `results_schema` for a slice's images, each given with what it became."""
    names = job.schema.names
    batches: list[pa.RecordBatch] = []
    counts: Counter[str] = Counter()
    problems: list[dict[str, str]] = []

    def outputs() -> Iterator[Row]:
        for row, result in computed:
            if isinstance(result, Exception):
                problems.append({"key": row["key"], "reason": _reason(result)})
            else:
                counts.update({name: int(value) for name, value in result.items() if name not in names})
                yield {**{name: result.get(name) for name in names}, "image_id": row["image_id"]}

    for rows in in_batches(outputs(), _PACK_ROWS):
        batches.append(pa.RecordBatch.from_pylist(rows, job.schema))
    table = pa.Table.from_batches(batches, job.schema)
    columns = [column.combine_chunks() for column in table.columns]
    made = pa.StructArray.from_arrays(columns, fields=list(job.schema))
    rows_column = pa.ListArray.from_arrays(pa.array([0, table.num_rows], pa.int32()), made)
    return pa.Table.from_arrays(
        [
            *one.columns,
            pa.array([list(counts.items())], pa.map_(pa.string(), pa.int64())),
            pa.array([problems], results_schema(job).field("problems").type),
            rows_column,
        ],
        schema=results_schema(job),
    )


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ImageError) else f"{type(error).__name__}: {text}"
