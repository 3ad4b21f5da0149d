"""What each Ray Train worker runs: assemble, train, and on rank 0 write the artifact's files.

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
from stages.pretrain.config.pretrain import PretrainConfig
from stages.pretrain.launch.artifact import write_artifact
from stages.pretrain.launch.assemble import Pretraining, assemble
from stages.pretrain.launch.continuing import FromKeptState
from stages.pretrain.launch.loading import loader_workers
from stages.pretrain.launch.notices import RankNotices
from stages.pretrain.launch.ray_checkpoints import RayCheckpoints
from stages.pretrain.launch.replay import leaver
from stages.training.loop import train
from stages.training.optim import build_optimizer


def work(job: dict[str, Any]) -> tuple[Outcome, list[dict[str, float]]] | None:
    """Train as the rank that this process is.

    Args:
        job: what ray_train.py sends: "config" (JSON-able), "inputs", "output", "run" (what its checkpoints name),
            "relay", "cpus" and "threads".

    Returns:
        On rank 0 the outcome and all rows of the curves; None on the others, and where training must not start again.
    """
    config, relay = PretrainConfig.model_validate(job["config"]), job["relay"]
    if ray.get(relay.stopped.remote()):
        return None
    torch.set_num_threads(job["threads"])
    rank, world_size = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        training = assemble(
            config,
            job["inputs"],
            rank=rank,
            world_size=world_size,
            device=device,
            loader_workers=loader_workers(config, job["cpus"]),
        )
        report: Callable[[dict[str, float]], None] = relay.push.remote if rank == 0 else lambda row: None
        leave_replay = leaver(config, job["inputs"], training, job["output"])
        checkpoints = RayCheckpoints(job["run"], rank, world_size, relay, training.last_step)
        started = FromKeptState(checkpoints, job["inputs"], training.last_step)
        # Some ranks may still copy images to their node: for that there is no limit, as there is for exchanges later.
        ray.train.collective.barrier()
        state = train(training, started, report, leave_replay, RankNotices(rank, relay))
        if rank != 0:
            return None
        if config.strategy == "fsdp2" and world_size > 1:
            training = reassembled(config, job, checkpoints, started)
        return write_artifact(config, job["inputs"], job["output"], training, state, started), state.curves
    except TesseraError as error:
        # Raised, so that Ray Train ends the other ranks, which may wait for this one in a collective; noted first,
        # so that the workers it then starts again return at once, and the driver says why.
        ray.get(relay.stop.remote(str(error)))
        raise


def reassembled(
    config: PretrainConfig, job: dict[str, Any], checkpoints: RayCheckpoints, started: FromKeptState
) -> Pretraining:
    """On one rank the whole of a training whose ranks held a share each, from its last checkpoint.

    Args:
        config: of the stage.
        job: see `work`.
        checkpoints: of the training that has ended.
        started: gets the whole optimiser, whose state may be kept.
    """
    training = assemble(config, job["inputs"])
    started.optimizer = build_optimizer(training.method, config.optimizer)
    checkpoints.newest(training.method, started.optimizer)
    return training
