"""The data of a training: batches of views as a pure function of the step number.

`TrainData.batches(start, stop)` gives the same global batches whatever the number of ranks, the number of loader
processes and the step it starts from. Loader processes read, decode and (on a CPU) render single images and send them
as uint8; the rank stacks, normalises and, on a GPU, renders them.

Shape legend: V views of one kind, B images of this rank, S side of a view.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.errors import ClusterError, SourceError, TesseraError, UsageError
from stages.pretrain.data.batch import Batch
from stages.pretrain.data.collate import Chunk, assemble_batch, collate
from stages.pretrain.data.sampler import Sampler
from stages.pretrain.data.samples import ImageSource, Reader
from stages.pretrain.views.plan import ViewPlan

__all__ = ["ImageSource", "TrainData"]

MAX_CHUNK = 32  # images that a loader process sends at once: bounds shared memory and the wait for the first batch


class TrainData:
    """The batches of one rank.

    Args:
        sources: one image set, or several mixed by their weights (sampler.py).
        plan: the method's views and tables.
        global_batch: images of one forward pass over all ranks; `rank` gets rows [rank*B, (rank+1)*B) of it.
        seed: of the order of the images and of the views; batches are a function of it and the step.
        rank: which of the `world_size` ranks this is.
        world_size: number of ranks.
        workers: loader processes, which read and render; 0: this process does it.
        renderer: "cpu" (OpenCV, in the loader processes), "gpu" (torch, on `device`; loader processes only decode), or
            "auto": "gpu" where `device` is a GPU.
        device: where batches end up; default: the GPU for renderer "gpu", else the CPU.
        mean: of red, green, blue on the [0, 1] scale, which the encoder expects to be taken off.
        std: likewise, which the encoder expects its input to be divided by.

    Raises:
        UsageError: when a table that the plan asks for is missing.
        ValueError: when the number of ranks does not divide the batch, or the batch does not fit the sources.
    """

    def __init__(
        self,
        sources: Sequence[ImageSource],
        plan: ViewPlan,
        *,
        global_batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        renderer: Literal["auto", "cpu", "gpu"] = "auto",
        device: torch.device | str | None = None,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        if global_batch % world_size:
            raise ValueError(f"{world_size} ranks cannot share a batch of {global_batch} images equally")
        _check_tables(sources, plan)
        self.device = torch.device(device or ("cuda" if renderer == "gpu" else "cpu"))
        if renderer == "auto":
            renderer = "gpu" if self.device.type == "cuda" else "cpu"
        self.sampler = Sampler([len(s.chosen) for s in sources], [s.weight for s in sources], global_batch, seed)
        self.reader = Reader(sources, plan, seed, render=renderer == "cpu")
        self.share, self.offset = global_batch // world_size, rank * (global_batch // world_size)
        self.seed, self.workers, self.renderer = seed, workers, renderer
        self.mean, self.std = tuple(float(x) for x in mean), tuple(float(x) for x in std)

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of one epoch."""
        return self.sampler.steps_per_epoch

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """This rank's share of the global batches start .. stop-1.

        Raises:
            SourceError: when no image of a source is usable.
            ClusterError: when a loader process dies.
        """
        chunks: list[Chunk] = []
        for chunk in self._chunks(start, stop):
            if chunk.failure:
                raise SourceError(chunk.failure)
            chunks.append(chunk)
            if sum(len(c) for c in chunks) == self.share:
                yield self._finish(chunks)
                chunks = []

    def _finish(self, chunks: list[Chunk]) -> Batch:
        batch = assemble_batch(chunks, self.device, self.mean, self.std)
        for chunk in chunks:
            for skip in chunk.skipped:
                batch.skipped[skip.reason] = batch.skipped.get(skip.reason, 0) + 1
                batch.problems[skip.key] = skip.detail or skip.reason
        batch.seed = _step_seed(self.seed, chunks[0].step)
        batch.offset = self.offset
        return batch

    def _chunks(self, start: int, stop: int) -> Iterator[Chunk]:
        size = self.share if not self.workers else min(MAX_CHUNK, -(-self.share // self.workers))
        chunks = _Chunks(self.sampler, self.reader)
        specs = _ChunkSpecs(start, stop, self.offset, self.offset + self.share, size)
        if not self.workers:
            yield from (chunks[spec] for spec in specs)
            return
        loader = DataLoader(
            chunks,
            batch_size=None,
            sampler=specs,
            num_workers=self.workers,
            prefetch_factor=4,
            multiprocessing_context=worker_context(),
            worker_init_fn=_start_worker,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or it would advance torch's global generator, which training draws from
        )
        try:
            yield from loader
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise ClusterError(
                f"a process that reads training images died ({str(error).splitlines()[0]}): most often memory or "
                "/dev/shm was full; lower loader_workers or the batch size"
            ) from error


class _ChunkSpec(NamedTuple):
    """Which rows a chunk holds: start .. stop-1 of a step's global batch."""

    step: int
    start: int
    stop: int


class _Chunks(Dataset[Chunk]):
    """What a loader process computes: the chunk of a spec."""

    def __init__(self, sampler: Sampler, reader: Reader) -> None:
        self.sampler, self.reader = sampler, reader

    def __getitem__(self, spec: _ChunkSpec) -> Chunk:
        step, start, stop = spec
        try:
            return collate(step, [self.reader.read(slot) for slot in self.sampler.slots(step, start, stop)])
        except TesseraError as error:  # as a value: the loader would wrap the message in a traceback
            return Chunk(step, failure=str(error))


class _ChunkSpecs:
    """The specs of all chunks in order, made one by one: rows start .. stop-1 of the steps first .. last-1."""

    def __init__(self, first: int, last: int, start: int, stop: int, size: int) -> None:
        self.steps, self.rows = range(first, last), [(a, min(a + size, stop)) for a in range(start, stop, size)]

    def __iter__(self) -> Iterator[_ChunkSpec]:
        return (_ChunkSpec(step, a, b) for step in self.steps for a, b in self.rows)

    def __len__(self) -> int:
        return len(self.steps) * len(self.rows)


def worker_context() -> Any:
    """Never fork: a rank has threads (Ray, torch, NCCL). A fork server imports torch once for all loader processes."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["stages.pretrain.data.loader"])
    return context


def _start_worker(_: int) -> None:
    cv2.setNumThreads(1)


def _step_seed(seed: int, step: int) -> int:
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 0x94D049BB) % (2**62)


def _check_tables(sources: Sequence[ImageSource], plan: ViewPlan) -> None:
    for spec in plan.views:
        if spec.of == "neighbor" and (spec.labels or "neighbors" not in plan.tables):
            raise UsageError(
                f"view {spec.name!r} shows the neighbour: such a view has no labels, and the plan's tables must name "
                "`neighbors`"
            )
    for table in plan.tables:
        missing = [str(i) for i, source in enumerate(sources) if getattr(source, table) is None]
        # Some sources may come without neighbours (their images get neighbor_id -1), but not all of them.
        if missing and (table != "neighbors" or len(missing) == len(sources)):
            raise UsageError(
                f"the method reads {table}, and source {', '.join(missing)} of images has none: "
                f"give the method a `{table}` stage made from those images"
            )
