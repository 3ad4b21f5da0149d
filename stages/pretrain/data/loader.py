"""The data of a training: batches of views as a pure function of the step number.

`TrainData.batches(start, stop)` gives the same global batches whatever the number of ranks, the number of loader
processes and the step it starts from. Loader processes read, decode and (on a CPU) render single images and send them
as uint8; the rank stacks, normalises and, on a GPU, renders them.

Shape legend: V views of one kind, B images of this rank, S side of a view.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from pipeline.errors import UsageError
from stages.pretrain.data.batch import Batch
from stages.pretrain.data.collate import Chunk, assemble_batch, collate
from stages.pretrain.data.samples import ImageSource, Reader
from stages.pretrain.views.plan import ViewPlan
from stages.training.loader import Share, read_batches
from stages.training.sampler import Sampler

__all__ = ["ImageSource", "TrainData"]


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
        _check_tables(sources, plan)
        self.device = torch.device(device or ("cuda" if renderer == "gpu" else "cpu"))
        if renderer == "auto":
            renderer = "gpu" if self.device.type == "cuda" else "cpu"
        self.share = Share(global_batch, rank, world_size, workers, pinned=self.device.type == "cuda")
        self.sampler = Sampler([len(s.chosen) for s in sources], [s.weight for s in sources], global_batch, seed)
        self.chunks = ViewChunks(self.sampler, Reader(sources, plan, seed, render=renderer == "cpu"))
        self.seed, self.renderer = seed, renderer
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
        for chunks in read_batches(self.chunks, self.share, start, stop):
            yield self._finish(chunks)

    def _finish(self, chunks: list[Chunk]) -> Batch:
        batch = assemble_batch(chunks, self.device, self.mean, self.std)
        for chunk in chunks:
            for skip in chunk.skipped:
                batch.skipped[skip.reason] = batch.skipped.get(skip.reason, 0) + 1
                batch.problems[skip.key] = skip.detail or skip.reason
        batch.seed = _step_seed(self.seed, chunks[0].step)
        batch.offset = self.share.offset
        return batch


class ViewChunks:
    """What a loader process computes."""

    def __init__(self, sampler: Sampler, reader: Reader) -> None:
        self.sampler, self.reader = sampler, reader

    def make(self, step: int, start: int, stop: int) -> Chunk:
        """Rows start .. stop-1 of a step's global batch."""
        return collate(step, [self.reader.read(slot) for slot in self.sampler.slots(step, start, stop)])


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
