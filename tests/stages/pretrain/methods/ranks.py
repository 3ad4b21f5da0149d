"""Methods on one rank and on two, for the tests that both train alike."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from stages.models.sync_batch_norm import convert
from stages.pretrain.data.batch import Batch
from stages.pretrain.methods.method import Method, Step
from stages.training.loop import compute_total, update

LIBRARIES = ["pytest", "torch", "timm", "lightly.loss", "stages.models.encoder", "stages.pretrain.data.loader"]
Results = dict[str, Any]
Worker = Callable[[int, int], Results]  # of a rank and the number of ranks; a function of a module, so that it pickles


def on_one_and_two(worker: Worker, folder: Path) -> tuple[Results, list[Results]]:
    """What `worker` returns alone in this process, and what on each of two ranks."""
    return worker(0, 1), on_two(worker, folder)


def on_two(worker: Worker, folder: Path) -> list[Results]:
    """What `worker` returns on each of two ranks, fresh processes of one thread under gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # They fork from a server that has imported the libraries, once for all tests; nothing else is shared.
    multiprocessing.set_forkserver_preload(LIBRARIES)
    mp.start_processes(_on_rank, args=(worker, folder, port), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _on_rank(rank: int, worker: Worker, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.save(worker(rank, 2), folder / f"{rank}.pt")
    dist.destroy_process_group()


def steps_of(
    method: Method, batches: Iterable[Batch], world_size: int, *, lr: float, find_unused_parameters: bool = False
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Train as the loop does, with plain SGD; of each step the terms, a mean over the ranks, and the gradients.

    Unless parameters may go unused, one that does is an error on two ranks.
    """
    wrapped: torch.nn.Module = method
    if world_size > 1:
        convert(method)
        wrapped = torch.nn.parallel.DistributedDataParallel(method, find_unused_parameters=find_unused_parameters)
    optimizer = torch.optim.SGD(method.trained_parameters(), lr=lr)
    for index, batch in enumerate(batches):
        step = Step(index, 10, 1)
        method.start_step(step)
        terms, total = compute_total(wrapped, batch, {}, precision="fp32")
        torch.autograd.backward(total)
        method.before_update(step)
        gradients = [p.grad.clone() for p in method.parameters() if p.grad is not None]
        update(method, optimizer, step)
        values = torch.stack([term.detach() for term in terms.values()])
        if world_size > 1:
            dist.all_reduce(values)
        yield values / world_size, gradients


def assert_alike(
    name: str,
    mine: tuple[Tensor, list[Tensor]],
    theirs: tuple[Tensor, list[Tensor]],
    *,
    terms: tuple[float, float],
    gradients: tuple[float, float],
) -> None:
    """Two steps agree: tolerances are (relative, absolute), for gradients the absolute one in parts of the largest."""
    rtol, atol = terms
    torch.testing.assert_close(mine[0], theirs[0], rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")
    largest = max(float(gradient.abs().max()) for gradient in theirs[1])
    rtol, atol = gradients[0], gradients[1] * largest
    for gradient, expected in zip(mine[1], theirs[1], strict=True):
        torch.testing.assert_close(gradient, expected, rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")
