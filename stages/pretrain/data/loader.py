"""The data of a training run: batches of views as a pure function of the step number.

`TrainData.batches(start, stop)` gives the same global batches whatever the world size, the number of worker
processes and the step it starts from. Workers read, decode and (on a CPU) render single images; what they send is
uint8; here it is stacked, normalised and, on a GPU, rendered.

Shape legend: V views of one kind, B images of this rank, S side of a view.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.errors import ClusterError, SourceError, TesseraError, UsageError
from stages.pretrain.data.batch import Batch
from stages.pretrain.data.collate import Part, assemble_batch, collate
from stages.pretrain.data.sampler import Sampler
from stages.pretrain.data.samples import ImageSource, Reader
from stages.pretrain.views.plan import ViewPlan

__all__ = ["ImageSource", "TrainData"]

MAX_PART = 32  # images a worker sends at once: bounds shared memory and the wait for the first batch
_Task = tuple[int, int, int]  # step, and the rows start..stop-1 of its global batch


class TrainData:
    """The batches of one rank.

    Args:
        sources: one image set, or several mixed by their weights (sampler.py).
        plan: the method's views and tables.
        global_batch: images of one step over all ranks; `rank` gets rows [rank*B, (rank+1)*B) of it.
        workers: processes that read and render; 0 does it in this one.
        renderer: "cpu" (OpenCV, in the workers), "gpu" (torch, on `device`; workers only decode), or "auto": "gpu"
            where `device` is a GPU.
        device: where batches end up; default: the GPU for renderer "gpu", else the CPU.
        mean, std: of red, green, blue on the [0, 1] scale; the encoder's.

    Attributes: steps_per_epoch.
    Raises: UsageError when ranks do not divide the batch, or a table that the plan asks for is missing.
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
            raise UsageError(
                f"a batch of {global_batch} images cannot be shared by {world_size} workers: "
                "choose a batch size that is a multiple of resources.workers"
            )
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
        return self.sampler.steps_per_epoch

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """This rank's share of the global batches start .. stop-1.

        Raises: SourceError when no image is usable, ClusterError when a worker process dies.
        """
        parts: list[Part] = []
        for part in self._parts(start, stop):
            if part.failure:
                raise SourceError(part.failure)
            parts.append(part)
            if sum(len(p) for p in parts) == self.share:
                yield self._finish(parts)
                parts = []

    def _finish(self, parts: list[Part]) -> Batch:
        batch = assemble_batch(parts, self.device, self.mean, self.std)
        for part in parts:
            for skip in part.skipped:
                batch.skipped[skip.reason] = batch.skipped.get(skip.reason, 0) + 1
                batch.problems[skip.key] = skip.detail or skip.reason
        batch.seed = _step_seed(self.seed, parts[0].step)
        batch.offset = self.offset
        return batch

    def _parts(self, start: int, stop: int) -> Iterator[Part]:
        size = self.share if not self.workers else min(MAX_PART, -(-self.share // self.workers))
        parts = _Parts(self.sampler, self.reader)
        tasks = _Tasks(start, stop, self.offset, self.offset + self.share, size)
        if not self.workers:
            yield from (parts[task] for task in tasks)
            return
        loader = DataLoader(
            parts,
            batch_size=None,
            sampler=tasks,
            num_workers=self.workers,
            prefetch_factor=4,
            multiprocessing_context=worker_context(),
            worker_init_fn=_start_worker,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # its own: the run's random state must not hang on the number of workers
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


class _Parts(Dataset[Part]):
    """What a worker computes: rows of a global batch, as one piece."""

    def __init__(self, sampler: Sampler, reader: Reader) -> None:
        self.sampler, self.reader = sampler, reader

    def __getitem__(self, task: _Task) -> Part:
        step, start, stop = task
        try:
            return collate(step, [self.reader.read(slot) for slot in self.sampler.slots(step, start, stop)])
        except TesseraError as error:  # as a value: the loader would wrap the message in a traceback
            return Part(step, failure=str(error))


class _Tasks:
    """(step, start, stop) in order, without listing them all."""

    def __init__(self, first: int, last: int, start: int, stop: int, size: int) -> None:
        self.steps, self.rows = range(first, last), [(a, min(a + size, stop)) for a in range(start, stop, size)]

    def __iter__(self) -> Iterator[_Task]:
        return ((step, a, b) for step in self.steps for a, b in self.rows)

    def __len__(self) -> int:
        return len(self.steps) * len(self.rows)


def worker_context() -> Any:
    """Never fork: the trainer has threads (Ray, torch, NCCL). A fork server imports torch once for all workers."""
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
            raise UsageError(f"view {spec.name!r} of the neighbour: it has no labels, and its plan names `neighbors`")
    for table in plan.tables:
        missing = [str(i) for i, source in enumerate(sources) if getattr(source, table) is None]
        # Images of a source without neighbours have neighbor_id -1; all of them so would be a mistake.
        if missing and (table != "neighbors" or len(missing) == len(sources)):
            raise UsageError(
                f"the method reads {table}, and source {', '.join(missing)} of images has none: "
                f"give the method a `{table}` stage made from those images"
            )
