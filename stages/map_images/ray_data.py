"""`map_images`: an images artifact in, one output table out, image by image, on Ray Data.

Ray Data hands slices of the images to workers, which read, compute and write; a shard of the images becomes the shard
of the same number of the output, or several where rows are large. The driver gets row numbers only, memory stays flat,
and a run that was killed continues with the missing shards. An image that fails is named and left out; it never stops
the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.errors import SourceError
from stages.map_images.execution import count_workers, results
from stages.map_images.slices import count_cuts, cut, pack, split
from stages.map_images.worker import (
    SLICES,
    Job,
    Row,
    ShardActor,
    SliceActor,
    record_name,
    run_shard,
    run_slice,
    write_shard,
)

if TYPE_CHECKING:
    from pipeline.stage import Context
    from pipeline.store.artifact import Artifact
    from pipeline.store.writer import ArtifactWriter

# That pay for one more actor: it imports torch and builds a model, 8 s of a CPU, and takes about 30 ms an image.
_IMAGES_AN_ACTOR = 256


@dataclass
class MapSummary:
    """What became of the images; `counts` and `problems` go into the stage's Outcome."""

    images: int = 0  # that have a row in the output
    failed: int = 0
    counts: dict[str, int] = field(default_factory=dict)  # what `process` counted, summed up
    problems: list[dict[str, str]] = field(default_factory=list)  # {"key", "reason"} of the failed
    resumed: int = 0  # shards that an earlier attempt had finished


def map_images(
    context: Context,
    images: Artifact,
    process: Callable[..., Any],
    *,
    schema: pa.Schema,
    columns: Sequence[str] = ("image",),
    arguments: Sequence[Any] = (),
    prepare: Callable[[Row], Row] | None = None,
    batch_rows: int = 16,
    shard_rows: int | None = None,
    cpus: float = 1.0,
    gpus: float = 0.0,
    threads: int = 2,
) -> MapSummary:
    """Computes one output row per image and writes the output's shards.

    `process` is a function or a class, importable by Ray's workers:
    - a function `process(row, *arguments) -> row` runs in tasks, one image at a time; what it raises is that image's
      problem;
    - a class is made once per actor, `process(*arguments)`; its instance takes a list of up to `batch_rows` rows and
      returns as many rows; an Exception in place of a row is that image's problem, one that it raises stops the stage.
      `prepare(row) -> row` (decoding, resizing) then runs in `threads` threads of the actor, ahead of the batches.

    An input row has `image_id`, `key` and `columns`. Of an output row, the keys of `schema` are its columns
    (`image_id` is added), any other key is a number that is added up in `MapSummary.counts`.

    Progress is reported slice by slice; where shards had to be cut to give all workers work, shard by shard.

    Args:
        context: of the stage; its `resources` override `cpus`, `gpus`, `batch_rows` and the number of workers.
        images: the artifact that is read.
        process: see above.
        schema: of the output table.
        columns: of the images' table that a row has.
        arguments: further arguments of the function, or those of the class.
        prepare: see above.
        batch_rows: rows that an instance of the class takes at once.
        shard_rows: of an output shard at most, for rows so large that a shard would not fit into a worker's memory;
            default: a shard of the images becomes one of the output.
        cpus: of one worker.
        gpus: of one worker.
        threads: of one actor, for `prepare`.

    Raises: SourceError when no image succeeds; ClusterError when the cluster cannot hold one worker.
    """
    settings = context.resources
    shards = split([shard.rows or 0 for shard in images.shards()], shard_rows)
    job = Job(
        images,
        shards,
        context.output,
        schema,
        tuple(dict.fromkeys(["image_id", "key", *columns])),
        process,
        tuple(arguments),
        prepare,
        settings.batch_size or batch_rows,
        threads,
    )
    rows = {index: one.stop - one.start for index, one in enumerate(shards)}
    missing = _missing(context.output, rows)
    if missing:
        gpus = gpus if settings.gpus is None else settings.gpus
        pool = _pool(settings.cpus or cpus, gpus, settings.concurrency, actors=isinstance(process, type))
        total = sum(rows.values())
        done = total - sum(missing.values())
        context.report_progress(done, total, "images")
        for finished in _compute(job, missing, pool):
            done += finished
            context.report_progress(done, total, "images")
    return _sum_up(context.output, images, len(rows), resumed=len(rows) - len(missing))


def _missing(output: ArtifactWriter, rows: dict[int, int]) -> dict[int, int]:
    """The shards that no earlier attempt has finished, with their rows."""
    recorded = output.records()
    return {
        index: count
        for index, count in rows.items()
        if record_name(index) not in recorded or output.shard_done(index) is None
    }


# ----------------------------------------------------------------------------------------------------- on the cluster
@dataclass(frozen=True)
class _Pool:
    """How many workers, of what size, and whether they are actors."""

    workers: int
    cpus: float
    gpus: float
    actors: bool


def _pool(cpus: float, gpus: float, concurrency: int | None, *, actors: bool) -> _Pool:
    """As many workers as fit on the nodes. They may own every CPU: nothing else of a stage asks Ray for one.

    Raises: ClusterError when no node can hold one.
    """
    return _Pool(count_workers(cpus, gpus, concurrency), cpus, gpus, actors)


def _compute(job: Job, missing: dict[int, int], pool: _Pool) -> Iterator[int]:
    """Computes and writes these shards; yields numbers of images that are behind us.

    The first second has a single task: only then does Ray Data ask again what the cluster has.
    """
    import ray.data

    rows = list(missing.values())
    if pool.actors:
        pool = replace(pool, workers=min(pool.workers, -(-sum(rows) // _IMAGES_AN_ACTOR) or 1))
    # Actors have enough with a slice each: the process that puts slices together has a start of its own.
    cuts = count_cuts(rows, pool.workers, each=1) if pool.actors else count_cuts(rows, pool.workers)
    slices = cut(missing, cuts)
    # Only whole shards in Ray's tasks gain from packing: actors get their next slice before they end one, and of a
    # shard in slices each is a task, so that several workers compute it.
    tasks = [[one] for one in slices] if pool.actors or cuts > 1 else list(pack(slices, pool.workers))
    size = min(pool.workers, len(tasks))
    compute: Any
    worker: Any
    if pool.actors:
        compute, worker = ray.data.ActorPoolStrategy(size=size), ShardActor if cuts == 1 else SliceActor
        options: Row = {"fn_constructor_args": (job,)}
    else:
        compute, worker = ray.data.TaskPoolStrategy(size=size), run_shard if cuts == 1 else run_slice
        options = {"fn_args": (job,)}
    blocks = [pa.Table.from_pylist([vars(one) for one in task], SLICES) for task in tasks]
    data = ray.data.from_arrow(blocks).map_batches(
        worker,
        batch_size=1,
        batch_format="pyarrow",
        compute=compute,
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
        **options,
    )
    if cuts > 1:
        # In order, `cuts` results are one shard. No CPU: the workers may own them all, and Ray Data would run two
        # steps that ask for the same in one task, which would then have the whole shard to compute.
        data.context.execution_options.preserve_order = True
        data = data.map_batches(write_shard, batch_size=cuts, batch_format="pyarrow", num_cpus=0, fn_args=(job,))
    for batch in results(data):
        yield sum(one["stop"] - one["start"] for one in batch.to_pylist())


# ------------------------------------------------------------------------------------------------------- at the end
def _sum_up(output: ArtifactWriter, images: Artifact, shards: int, resumed: int) -> MapSummary:
    """Adds up what workers have recorded of their shards. Raises SourceError when no image has a row."""
    records = output.records()
    summary, counts = MapSummary(resumed=resumed), Counter[str]()
    for index in range(shards):
        record = records[record_name(index)]
        summary.images += record["images"]
        summary.problems += record["problems"]
        counts.update(record["counts"])
    summary.counts, summary.failed = dict(counts), len(summary.problems)
    if not summary.images:
        first = "; ".join(f"{problem['key']}: {problem['reason']}" for problem in summary.problems[:3])
        raise SourceError(
            f"none of the {images.rows} images of {images.kind}/{images.fingerprint} could be used"
            + (f" ({first})" if first else "")
            + ": look at the first of these files, then at the stage's settings"
        )
    return summary
