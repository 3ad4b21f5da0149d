"""Reads the batches of a training in processes of their own: a pure function of the step number.

A rank's share of a global batch comes in chunks, which `Chunks.make` computes in a loader process or, with 0 workers,
here. The same batches come whatever the number of ranks, the number of loader processes and the step it starts from.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.errors import ClusterError, SourceError, TesseraError

MAX_CHUNK = 32  # images that a loader process sends at once: bounds shared memory and the wait for the first batch


class Chunks(Protocol):
    """Makes chunks of consecutive rows of a global batch; it pickles. A chunk's length is its number of rows."""

    def make(self, step: int, start: int, stop: int) -> Any:
        """Rows start .. stop-1 of a step's global batch.

        Raises:
            TesseraError: when they cannot be made; it ends the training.
        """


@dataclass(frozen=True)
class Share:
    """Which rows of every global batch a rank gets, and how they are read."""

    global_batch: int  # images of one forward pass over all ranks
    rank: int = 0
    world_size: int = 1
    workers: int = 0  # loader processes; 0: this process reads
    pinned: bool = False  # into page-locked memory, from which copies to a GPU are fast

    def __post_init__(self) -> None:
        if self.global_batch % self.world_size:
            raise ValueError(f"{self.world_size} ranks cannot share a batch of {self.global_batch} images equally")

    @property
    def images(self) -> int:
        """Rows of one rank."""
        return self.global_batch // self.world_size

    @property
    def offset(self) -> int:
        """This rank's first row."""
        return self.rank * self.images


def read_batches(chunks: Chunks, share: Share, start: int, stop: int) -> Iterator[list[Any]]:
    """The chunks of this rank's share of the global batches start .. stop-1, batch by batch.

    Args:
        chunks: makes them.
        share: which rows, and by how many processes.
        start: the first step.
        stop: the step after the last.

    Raises:
        SourceError: when a chunk cannot be made.
        ClusterError: when a loader process dies.
    """
    collected: list[Any] = []
    for chunk in _chunks(chunks, share, start, stop):
        if isinstance(chunk, _Failure):
            raise SourceError(chunk.why)
        collected.append(chunk)
        if sum(len(one) for one in collected) == share.images:
            yield collected
            collected = []


def _chunks(chunks: Chunks, share: Share, start: int, stop: int) -> Iterator[Any]:
    size = share.images if not share.workers else min(MAX_CHUNK, -(-share.images // share.workers))
    dataset = _Dataset(chunks)
    specs = _Specs(start, stop, share.offset, share.offset + share.images, size)
    if not share.workers:
        yield from (dataset[spec] for spec in specs)
        return
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=specs,
        num_workers=share.workers,
        prefetch_factor=4,
        multiprocessing_context=worker_context(type(chunks).__module__),
        worker_init_fn=_start_worker,
        pin_memory=share.pinned,
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


class _Spec(NamedTuple):
    """Which rows a chunk holds: start .. stop-1 of a step's global batch."""

    step: int
    start: int
    stop: int


class _Failure(NamedTuple):
    """In place of a chunk that could not be made: as a value, since the loader would wrap an error in a traceback."""

    why: str


class _Dataset(Dataset[Any]):
    """What a loader process computes: the chunk of a spec."""

    def __init__(self, chunks: Chunks) -> None:
        self.chunks = chunks

    def __getitem__(self, spec: _Spec) -> Any:
        try:
            return self.chunks.make(*spec)
        except TesseraError as error:
            return _Failure(str(error))


class _Specs:
    """The specs of all chunks in order, made one by one: rows start .. stop-1 of the steps first .. last-1."""

    def __init__(self, first: int, last: int, start: int, stop: int, size: int) -> None:
        self.steps, self.rows = range(first, last), [(a, min(a + size, stop)) for a in range(start, stop, size)]

    def __iter__(self) -> Iterator[_Spec]:
        return (_Spec(step, a, b) for step in self.steps for a, b in self.rows)

    def __len__(self) -> int:
        return len(self.steps) * len(self.rows)


def worker_context(module: str) -> Any:
    """Never fork: a rank has threads (Ray, torch, NCCL). A fork server imports torch once for all loader processes.

    Args:
        module: what the loader processes run, imported by the server.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


def _start_worker(_: int) -> None:
    cv2.setNumThreads(1)
