"""Ray Data as the stages use it: how many workers fit, and results as they come, with errors that are ours."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipeline.errors import ClusterError, StageFailed, TesseraError
from pipeline.stage import nodes


def count_workers(cpus: float, gpus: float, most: int | None) -> int:
    """As many workers as fit on the nodes. They may own every CPU: nothing else of a stage asks Ray for one.

    Args:
        cpus: of one worker.
        gpus: of one worker.
        most: at most so many.

    Raises: ClusterError when no node can hold one.
    """
    there = nodes()
    fitting = [
        min(int(have.get(name, 0.0) / wanted) for name, wanted in (("CPU", cpus), ("GPU", gpus)) if wanted)
        for have in there
    ]
    if not sum(fitting):
        largest: dict[str, float] = max(there, key=lambda have: have.get("CPU", 0.0), default={})
        raise ClusterError(
            f"one worker asks for {cpus:g} CPUs and {gpus:g} GPUs, the largest of the cluster's {len(there)} nodes "
            f"has {largest.get('CPU', 0):g} and {largest.get('GPU', 0):g} "
            "(lower resources.cpus and resources.gpus of the stage, or join a cluster of larger nodes)"
        )
    return min(sum(fitting), most or sum(fitting))


def results(data: Any) -> Iterator[pa.Table]:
    """Runs a Ray Dataset and yields its blocks as they are finished.

    Raises: TesseraError, a worker's own or one that names what stopped it.
    """
    import ray

    _configure(data)
    _only_to_its_file("ray.data")
    try:
        # Not `iter_batches`, which waits in a way that an interrupt of a stage beside others cannot end.
        for bundle in data.iter_internal_ref_bundles():
            for block in bundle.blocks:
                yield ray.get(block.ref)
    except TesseraError:
        raise
    except Exception as error:
        raise _cause(error) from error


def _configure(data: Any) -> None:
    """The settings of Ray Data that this work needs, each with what it does without."""
    # A finished slice is reported at once, not with the rest of its task: of a run of 13.2 s on two CPUs the first
    # report comes after 1.7 s, without this after 6.0 s, at the same speed.
    data.context.target_max_block_size = 1
    # Ray Data stops what reports nothing for 30 minutes; OpenCV's "quality" search takes 51 minutes for a slice of
    # 1024 photographs (3.0 s each).
    data.context.execution_no_progress_timeout_s = -1
    # A TesseraError of a worker arrives as itself, not as a text inside one of Ray's errors.
    data.context.raise_original_map_exception = True


def _only_to_its_file(logger: str) -> None:
    """Keep Ray Data's lines in its log file: on a failure it prints 130 of them before our error, which says why."""
    for handler in logging.getLogger(logger).handlers:
        if "File" not in type(handler).__name__:
            handler.setLevel(logging.CRITICAL)


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
