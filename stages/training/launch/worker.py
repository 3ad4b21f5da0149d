"""What each Ray Train worker runs: assemble, train, and on rank 0 write the artifact's files (work.py).

Workers talk to the driver through one relay actor, so that a logged row is no barrier.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch

from pipeline.errors import TesseraError
from pipeline.stage import Outcome
from stages.training.launch.loading import loader_workers
from stages.training.launch.notices import RankNotices
from stages.training.launch.ray_checkpoints import RayCheckpoints
from stages.training.launch.work import Work
from stages.training.loop import Training, train
from stages.training.optim import build_optimizer


def work(job: dict[str, Any]) -> tuple[Outcome, list[dict[str, float]]] | None:
    """Train as the rank that this process is.

    Args:
        job: what ray_train.py sends: "work" (the import path), "config" (JSON-able), "inputs", "output", "run" (what
            its checkpoints name), "relay", "cpus" and "threads".

    Returns:
        On rank 0 the outcome and all rows of the curves; None on the others, and where training must not start again.
    """
    relay = job["relay"]
    if ray.get(relay.stopped.remote()):
        return None
    torch.set_num_threads(job["threads"])
    rank, world_size = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        mine = Work.of(job["work"], job["config"], job["inputs"], job["output"])
        training = mine.assemble(
            rank=rank,
            world_size=world_size,
            device=device,
            loader_workers=loader_workers(mine.settings, job["cpus"]),
        )
        report: Callable[[dict[str, float]], None] = relay.push.remote if rank == 0 else lambda row: None
        leave_replay = mine.leave_replay(training)
        own = RayCheckpoints(job["run"], rank, world_size, relay, training.last_step)
        checkpoints = mine.checkpoints(own, training)
        # Some ranks may still copy images to their node: for that there is no limit, as there is for exchanges later.
        ray.train.collective.barrier()
        state = train(training, checkpoints, report, leave_replay, RankNotices(rank, relay))
        if rank != 0:
            return None
        if training.settings.strategy == "fsdp2" and world_size > 1:
            training = reassembled(mine, own)
        return mine.write(training, state), state.curves
    except TesseraError as error:
        # Raised, so that Ray Train ends the other ranks, which may wait for this one in a collective; noted first,
        # so that the workers it then starts again return at once, and the driver says why.
        ray.get(relay.stop.remote(str(error)))
        raise


def reassembled(mine: Work, checkpoints: RayCheckpoints) -> Training:
    """On one rank the whole of a training whose ranks held a share each, from its last checkpoint.

    Args:
        mine: puts the training together again, and gets the whole optimiser, whose state may be kept.
        checkpoints: of the training that has ended.
    """
    training = mine.assemble()
    optimizer = build_optimizer(training.method, training.settings.optimizer)
    mine.take_optimizer(optimizer)
    checkpoints.newest(training.method, optimizer)
    return training
