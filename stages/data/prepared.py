"""Reading an evaluation's images once: rows of a split, decoded in threads while the encoder works on earlier ones.

Threads and not Ray: a small evaluation need not wait for a cluster, and the decoders release the interpreter's lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import SourceError
from stages.data.ahead import prepare_ahead
from stages.data.images import ImageError
from stages.data.rows import iter_rows

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact

T = TypeVar("T")


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
    wanted_rows = iter_rows(images, columns, ids=wanted)
    for row, result in prepare_ahead(wanted_rows, prepare, threads=threads, ahead=4 * threads):
        if isinstance(result, ImageError):
            problems.append({"key": str(row.get("key", row["image_id"])), "reason": str(result)})
        elif isinstance(result, Exception):
            raise result
        else:
            yield result


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
    for row in iter_rows(images, ["split"]):
        name = row["split"] or "(none)"
        counts[name] = counts.get(name, 0) + 1
    there = ", ".join(f"{name}: {count}" for name, count in sorted(counts.items())) or "no images at all"
    return SourceError(
        f"{stage}: no image of split {split!r} of {images.manifest.stage or images.name} has {what} "
        f"(images by split: {there}): {remedy}"
    )
