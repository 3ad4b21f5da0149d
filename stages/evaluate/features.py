"""Reading an evaluation's images once: rows of a split, decoded in threads while the encoder works on earlier ones.

Threads and not Ray: a small evaluation need not wait for a cluster, and the decoders release the interpreter's lock.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import SourceError
from stages.data.images import ImageError
from stages.data.rows import iter_batches, read_shard

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact

T = TypeVar("T")


def rows(images: Artifact, columns: Sequence[str], wanted: set[int] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of an `images` artifact in the order of their ids, streamed.

    With `wanted`, only these ids; the pixels of shards that hold none of them are never read.
    """
    names = ["image_id", *(name for name in columns if name != "image_id")]
    for entry in images.shards():
        span: tuple[int, int | None] = (0, None)
        if wanted is not None:
            ids = read_shard(images, entry, ["image_id"])["image_id"].to_pylist()
            held = [row for row, image_id in enumerate(ids) if image_id in wanted]
            if not held:
                continue
            span = held[0], held[-1] + 1
        for batch in iter_batches(images, entry, names, start=span[0], stop=span[1]):
            for i, image_id in enumerate(batch.column("image_id").to_pylist()):
                if wanted is None or image_id in wanted:
                    yield {name: batch.column(name)[i].as_py() for name in names}


def prepared(
    images: Artifact,
    columns: Sequence[str],
    prepare: Callable[[Mapping[str, Any]], T],
    wanted: set[int],
    *,
    problems: list[dict[str, str]],
    threads: int | None = None,
) -> Iterator[T]:
    """`prepare(row)` for the wanted rows, in the order of their ids, computed ahead in threads.

    Args:
        images: an artifact of kind `images`.
        columns: what `prepare` needs of a row; `image_id` is always there.
        prepare: called in a thread. A row for which it raises ImageError is left out.
        wanted: ids of the images.
        problems: grows by an entry for each row that is left out.
        threads: default: one a CPU, at most 8.
    """
    threads = threads or min(8, os.cpu_count() or 1)
    waiting: deque[tuple[Mapping[str, Any], Future[T]]] = deque()

    def finish() -> Iterator[T]:
        row, future = waiting.popleft()
        try:
            yield future.result()
        except ImageError as error:
            problems.append({"key": str(row.get("key", row["image_id"])), "reason": str(error)})

    with ThreadPoolExecutor(threads) as pool:
        for row in rows(images, columns, wanted):
            waiting.append((row, pool.submit(prepare, row)))
            if len(waiting) > 4 * threads:  # bounds the memory: encoded bytes and pixels of a few images
                yield from finish()
        while waiting:
            yield from finish()


def in_batches(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def split_error(stage: str, images: Artifact, split: str, what: str, remedy: str) -> SourceError:
    """The error for a split without anything to evaluate on; it names the splits that there are.

    Args:
        stage: its name in the pipeline.
        images: the artifact.
        split: the split in question.
        what: what none of its images has, e.g. "a label".
        remedy: what the user can do.
    """
    counts: dict[str, int] = {}
    for row in rows(images, ["split"]):
        name = row["split"] or "(none)"
        counts[name] = counts.get(name, 0) + 1
    there = ", ".join(f"{name}: {count}" for name, count in sorted(counts.items())) or "no images at all"
    return SourceError(
        f"{stage}: no image of split {split!r} in {images.kind}/{images.fingerprint} has {what} "
        f"(images by split: {there}): {remedy}"
    )
