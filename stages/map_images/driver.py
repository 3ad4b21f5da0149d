"""`map_shards`: an images artifact in, one table out, image by image, on Ray Data.

A part of the images becomes the part of the same number of the output, written by the worker that computed it: nothing
passes through the driver but counts, memory stays flat, and a run that was killed continues with the missing parts.
An image that fails is named and left out; it never stops the others.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.errors import ClusterError, SourceError, StageFailed, TesseraError
from stages.map_images.worker import Job, Piece, PieceActor, Report, Row, record_name, run_piece, write_part

if TYPE_CHECKING:
    from pipeline.stage import Context
    from pipeline.store.artifact import Artifact
    from pipeline.store.manifest import FileEntry
    from pipeline.store.writer import ArtifactWriter

_FEW = 4  # parts a worker; with fewer of them, parts are cut into pieces so that all workers have work to the end
_SMALLEST_PIECE = 8  # images
_LARGEST_TASK = 1024  # images; what a lost task computes again stays small


@dataclass
class ShardSummary:
    """What became of the images; `counts` and `problems` go into the stage's Outcome."""

    images: int = 0  # that have a row in the output
    failed: int = 0
    counts: dict[str, int] = field(default_factory=dict)  # what `process` counted, summed up
    problems: list[dict[str, str]] = field(default_factory=list)  # {"key", "reason"} of the failed
    resumed: int = 0  # parts that an earlier attempt had finished


def map_shards(
    context: Context,
    images: Artifact,
    process: Callable[..., Any],
    *,
    schema: pa.Schema,
    columns: Sequence[str] = ("image",),
    arguments: Sequence[Any] = (),
    prepare: Callable[[Row], Row] | None = None,
    batch_rows: int = 16,
    cpus: float = 1.0,
    gpus: float = 0.0,
    threads: int = 2,
) -> ShardSummary:
    """Computes one output row per image and writes the output's parts.

    `process` is a function or a class, importable by Ray's workers:
    - a function `process(row, *arguments) -> row` runs in tasks, one image at a time; what it raises is that image's
      problem;
    - a class is made once per actor, `process(*arguments)`; its instance takes a list of up to `batch_rows` rows and
      returns as many rows; an Exception in place of a row is that image's problem, one that it raises stops the stage.
      `prepare(row) -> row` (decoding, resizing) then runs in `threads` threads of the actor, ahead of the batches.

    An input row has `image_id`, `key` and `columns`. Of an output row, the keys of `schema` are its columns
    (`image_id` is added), any other key is a number that is added up in `ShardSummary.counts`.
    `context.resources` overrides `cpus`, `gpus`, `batch_rows` and the number of workers.

    Raises: SourceError when no image succeeds; ClusterError when the cluster cannot hold one worker.
    """
    settings = context.resources
    job = Job(
        images,
        context.output,
        schema,
        tuple(dict.fromkeys(["image_id", "key", *columns])),
        process,
        tuple(arguments),
        prepare,
        settings.batch_size or batch_rows,
        threads,
    )
    cpus, gpus = settings.cpus or cpus, gpus if settings.gpus is None else settings.gpus
    done, missing = _survey(context.output, images)
    total = sum(entry.rows or 0 for entry in images.shards())
    finished = total - sum(entry.rows or 0 for _, entry in missing)
    if missing:
        pool = _pool(cpus, gpus, settings.concurrency, actors=isinstance(process, type))
        context.report_progress(finished, total, "images")
        for piece_done in _compute(job, _pieces(missing, pool.workers), pool):
            context.report_progress(finished + piece_done, total, "images")
    return _summary(context.output, images, resumed=done)


# ----------------------------------------------------------------------------------------------- what is to be done
def _survey(output: ArtifactWriter, images: Artifact) -> tuple[int, list[tuple[int, FileEntry]]]:
    """Number of finished parts, and those that are missing (with their index)."""
    recorded = output.records()
    missing, done = [], 0
    for index, entry in enumerate(images.shards()):
        # The record is written before the part: a part without one was written by nobody who counted.
        if record_name(index) in recorded and output.shard_done(index) is not None:
            done += 1
        else:
            missing.append((index, entry))
    return done, missing


def _pieces(missing: Sequence[tuple[int, FileEntry]], workers: int) -> list[Piece]:
    """One piece a part where there are many parts; several where some workers would have none."""
    cuts = 1 if len(missing) >= _FEW * workers else -(-_FEW * workers // len(missing))
    pieces = []
    for index, entry in missing:
        rows = entry.rows or 0
        size = max(-(-rows // cuts), min(_SMALLEST_PIECE, rows), 1)
        starts = range(0, max(rows, 1), size)
        pieces += [Piece(index, entry, at, min(at + size, rows), len(starts) == 1) for at in starts]
    return pieces


def _tasks(pieces: Sequence[Piece], workers: int) -> list[list[Piece]]:
    """The pieces in tasks, in order: large ones first, because Ray Data leaves a worker idle for 0.1 to 0.2 s between
    two tasks, then smaller ones, so that all workers end together (guided self-scheduling)."""
    sizes = [piece.stop - piece.start for piece in pieces]
    left = sum(sizes)
    smallest = left / (4 * _FEW * workers)
    tasks: list[list[Piece]] = []
    room = 0.0
    for piece, size in zip(pieces, sizes, strict=True):
        if size > room:  # the first of a task may be larger than the task should be
            room = min(max(left / (2 * workers), smallest), _LARGEST_TASK)
            tasks.append([])
        tasks[-1].append(piece)
        room -= size
        left -= size
    return tasks


# ----------------------------------------------------------------------------------------------------- on the cluster
@dataclass(frozen=True)
class _Pool:
    workers: int
    cpus: float
    gpus: float
    actors: bool


def _pool(cpus: float, gpus: float, concurrency: int | None, *, actors: bool) -> _Pool:
    """How many workers, of what size. Tasks come and go and may use every CPU. Actors keep theirs, so they leave at
    least half a CPU to the rest of Ray: a pool that owns them all can wait for itself forever."""
    import ray

    have = ray.cluster_resources()
    free = have.get("CPU", 0.0) - (0.5 if actors else 0.0)
    if actors and cpus > free:  # whole CPUs only above one: Ray takes no 1.5
        cpus = float(int(free)) if free >= 1 else free
    if cpus > free or cpus <= 0 or gpus > have.get("GPU", 0.0):
        raise ClusterError(
            f"one worker asks for {cpus:g} CPUs and {gpus:g} GPUs, the cluster has {have.get('CPU', 0):g} and "
            f"{have.get('GPU', 0):g} (lower resources.cpus and resources.gpus of the stage, or join a larger cluster)"
        )
    workers = int(free / cpus)
    if gpus:
        workers = min(workers, int(have["GPU"] / gpus))
    return _Pool(min(workers, concurrency or workers), cpus, gpus, actors)


def _compute(job: Job, pieces: Sequence[Piece], pool: _Pool) -> Iterator[int]:
    """Runs the pieces; yields the number of images that are behind us, as reports come in."""
    import ray.data

    _only_to_its_file("ray.data")
    _learn_the_cluster(every=0.1)
    compute: Any
    worker: Any
    tasks = _tasks(pieces, pool.workers)
    size = min(pool.workers, len(tasks))
    if pool.actors:
        compute, worker = ray.data.ActorPoolStrategy(size=size), PieceActor
        options: Row = {"fn_constructor_args": (job,)}
    else:
        compute, worker, options = ray.data.TaskPoolStrategy(size=size), run_piece, {"fn_args": (job,)}
    blocks = [pa.table({"piece": [pickle.dumps(piece) for piece in task]}) for task in tasks]
    data = ray.data.from_arrow(blocks).map_batches(
        worker,
        batch_size=1,
        batch_format="pyarrow",
        compute=compute,
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
        **options,
    )
    data.context.enable_progress_bars = False
    data.context.print_on_execution_start = False
    data.context.target_max_block_size = 1  # reports leave a worker when they are made, not when a block is full
    data.context.memory_usage_poll_interval_s = None  # a worker would read its whole memory map every second
    data.context.execution_no_progress_timeout_s = -1  # one image may take long, and a cluster may be busy
    behind: dict[tuple[int, int], int] = {}
    assembly = _Assembly(job.output, pieces)
    try:
        for row in data.iter_rows():
            _learn_the_cluster(every=1.0)
            report: Report = pickle.loads(row["report"])
            behind[report.piece.shard, report.piece.start] = report.done
            assembly.take(report)
            yield sum(behind.values())
    except TesseraError:
        raise
    except Exception as error:
        raise _cause(error) from error


def _only_to_its_file(logger: str) -> None:
    """Ray Data's lines go to its log file; the terminal has our progress bar, and our error if it fails."""
    for handler in logging.getLogger(logger).handlers:
        if "File" not in type(handler).__name__:
            handler.setLevel(logging.CRITICAL)


def _learn_the_cluster(every: float) -> None:
    """Seconds between Ray Data's questions what the cluster has. It is told nothing the first time, and runs a single
    task until it asks again, a second later; so it asks more often until the first report is there."""
    with contextlib.suppress(ImportError):  # not part of Ray's interface: without it a stage starts a second later
        from ray.data._internal.execution.resource_manager import ResourceManager

        ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S = every


class _Assembly:
    """Puts parts together from their pieces, each written as soon as it is whole."""

    def __init__(self, output: ArtifactWriter, pieces: Sequence[Piece]) -> None:
        self._output = output
        self._waiting = Counter(piece.shard for piece in pieces)
        self._reports: dict[int, list[Report]] = {}

    def take(self, report: Report) -> None:
        if report.record is None or report.piece.whole:
            return
        shard = report.piece.shard
        self._reports.setdefault(shard, []).append(report)
        if len(self._reports[shard]) == self._waiting[shard]:
            reports = sorted(self._reports.pop(shard), key=lambda one: one.piece.start)
            record = _add([one.record for one in reports if one.record])
            write_part(
                self._output, shard, pa.concat_tables([one.table for one in reports if one.table is not None]), record
            )


def _cause(error: BaseException) -> TesseraError:
    """The error of ours inside what Ray wraps around it, or one that names the innermost."""
    from ray.exceptions import RayError

    seen: BaseException | None = error
    innermost = error
    while seen is not None:
        if isinstance(seen, TesseraError):
            return seen
        if not isinstance(seen, RayError):
            innermost = seen
        cause = getattr(seen, "cause", None)
        seen = cause if isinstance(cause, BaseException) else seen.__cause__
    lines = str(innermost).strip().splitlines() or [""]
    return StageFailed(f"a worker failed: {type(innermost).__name__}: {lines[0]} (its log is in Ray's session folder)")


# ------------------------------------------------------------------------------------------------------- at the end
def _add(records: Sequence[Row]) -> Row:
    counts: Counter[str] = Counter()
    for record in records:
        counts.update(record["counts"])
    problems = [problem for record in records for problem in record["problems"]]
    return {"images": sum(record["images"] for record in records), "counts": dict(counts), "problems": problems}


def _summary(output: ArtifactWriter, images: Artifact, resumed: int) -> ShardSummary:
    records = output.records()
    total = _add([records[record_name(index)] for index, _ in enumerate(images.shards())])
    summary = ShardSummary(total["images"], len(total["problems"]), total["counts"], total["problems"], resumed)
    if not summary.images:
        first = "; ".join(f"{problem['key']}: {problem['reason']}" for problem in summary.problems[:3])
        raise SourceError(
            f"none of the {images.rows} images of {images.kind}/{images.fingerprint} could be used"
            + (f" ({first})" if first else "")
            + ": look at the first of these files, then at the stage's settings"
        )
    return summary
