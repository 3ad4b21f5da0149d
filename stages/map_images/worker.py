"""What a Ray worker does with a piece of the images: read, compute image by image, write; `shards.py` hands it out."""

from __future__ import annotations

import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import cv2
import pyarrow as pa

from pipeline.errors import StageFailed
from stages.data.images import ImageError
from stages.data.tables import iter_batches

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact
    from pipeline.store.manifest import FileEntry
    from pipeline.store.writer import ArtifactWriter

Row: TypeAlias = dict[str, Any]
Batched: TypeAlias = Callable[[list[Row]], list[Any]]
REPORT_SECONDS = 1.0  # between two reports of one worker


@dataclass(frozen=True)
class Job:
    """All that a worker needs; travels to it once."""

    images: Artifact
    output: ArtifactWriter
    schema: pa.Schema
    columns: tuple[str, ...]
    process: Callable[..., Any]
    arguments: tuple[Any, ...]
    prepare: Callable[[Row], Row] | None
    batch_rows: int
    threads: int


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of one part of the images; `whole` when that is all of it."""

    shard: int
    entry: FileEntry
    start: int
    stop: int
    whole: bool


@dataclass
class Report:
    """From a worker: how many images of a piece are behind it, and at the piece's end what came of them."""

    piece: Piece
    done: int
    record: dict[str, Any] | None = None
    table: pa.Table | None = None  # of a piece that is not a whole part: the driver puts the part together


def run_piece(batch: pa.Table, job: Job) -> Iterator[pa.Table]:
    """One piece in a task; yields reports."""
    yield from _reports(batch, job, None)


class PieceActor:
    """Keeps one instance of `process` (a model, say) for all pieces that come to it."""

    def __init__(self, job: Job) -> None:
        _one_thread()
        self.job, self.process = job, job.process(*job.arguments)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        yield from _reports(batch, self.job, self.process)


def _one_thread() -> None:
    cv2.setNumThreads(1)  # the workers are the parallelism; OpenCV's own threads would fight them


def _reports(batch: pa.Table, job: Job, instance: Batched | None) -> Iterator[pa.Table]:
    _one_thread()
    for pickled in batch["piece"].to_pylist():
        for report in _work(pickle.loads(pickled), job, instance):
            yield pa.table({"report": [pickle.dumps(report)]})


def _work(piece: Piece, job: Job, instance: Batched | None) -> Iterator[Report]:
    """Computes a piece and, if it is a whole part, writes it. Reports about once a second."""
    made = _MadeRows(job.schema)
    rows = _read(piece, job)
    results = _one_by_one(rows, job) if instance is None else _by_batches(rows, job, instance)
    reported = time.monotonic()
    for row, result in results:
        made.add(row, result)
        if time.monotonic() - reported > REPORT_SECONDS:
            yield Report(piece, made.done)
            reported = time.monotonic()
    table, record = made.table(), made.record()
    if piece.whole:
        write_part(job.output, piece.shard, table, record)
    yield Report(piece, made.done, record, None if piece.whole else table)


def _read(piece: Piece, job: Job) -> Iterator[Row]:
    for batch in iter_batches(job.images, piece.entry, job.columns, 16, (piece.start, piece.stop)):
        yield from batch.to_pylist()


def _one_by_one(rows: Iterator[Row], job: Job) -> Iterator[tuple[Row, Any]]:
    for row in rows:
        yield row, _attempt(lambda row: job.process(row, *job.arguments), row)


def _by_batches(rows: Iterator[Row], job: Job, instance: Batched) -> Iterator[tuple[Row, Any]]:
    """Batches of prepared rows through the instance, the next ones being prepared meanwhile."""
    with ThreadPoolExecutor(job.threads) as threads:
        ahead: list[tuple[Row, Future[Any]]] = []
        while True:
            for row in islice(rows, 2 * job.batch_rows - len(ahead)):
                ahead.append((row, threads.submit(_attempt, job.prepare or (lambda row: row), row)))
            if not ahead:
                return
            batch, ahead = ahead[: job.batch_rows], ahead[job.batch_rows :]
            ready = [(row, future.result()) for row, future in batch]
            usable = [prepared for _, prepared in ready if not isinstance(prepared, Exception)]
            results = instance(usable) if usable else []
            if len(results) != len(usable):
                raise StageFailed(f"{type(instance).__name__} gave {len(results)} rows for {len(usable)} images")
            given = iter(results)
            for row, prepared in ready:
                yield row, prepared if isinstance(prepared, Exception) else next(given)


def _attempt(function: Callable[[Row], Any], row: Row) -> Any:
    """The result, or the exception: one image's failure is a value here."""
    try:
        return function(row)
    except Exception as error:
        return error


class _MadeRows:
    """Output rows of a piece, with what is counted beside them."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._batches: list[pa.RecordBatch] = []
        self._rows: list[Row] = []
        self._counts: Counter[str] = Counter()
        self._problems: list[dict[str, str]] = []
        self.done = 0

    def add(self, row: Row, result: Any) -> None:
        self.done += 1
        if isinstance(result, Exception):
            self._problems.append({"key": row["key"], "reason": _reason(result)})
            return
        names = self._schema.names
        self._rows.append(
            {name: result.get(name) for name in names if name != "image_id"} | {"image_id": row["image_id"]}
        )
        self._counts.update({name: int(value) for name, value in result.items() if name not in names})
        if len(self._rows) == 256:
            self._pack()

    def _pack(self) -> None:
        """Into Arrow, which holds a row in a tenth of what Python needs."""
        if self._rows:
            self._batches.append(pa.RecordBatch.from_pylist(self._rows, self._schema))
            self._rows = []

    def table(self) -> pa.Table:
        self._pack()
        return pa.Table.from_batches(self._batches, self._schema)

    def record(self) -> Row:
        images = self.done - len(self._problems)
        return {"images": images, "counts": dict(self._counts), "problems": self._problems}


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ImageError) else f"{type(error).__name__}: {text}"


def write_part(output: ArtifactWriter, shard: int, table: pa.Table, record: Row) -> None:
    """The record first: a part without one was written by nobody who counted, and is computed again."""
    output.record(record_name(shard), record)
    output.put_table(shard, table)


def record_name(shard: int) -> str:
    return f"shard-{shard:05d}"
