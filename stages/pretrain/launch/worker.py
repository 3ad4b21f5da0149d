"""What each Ray Train worker runs: assemble, train, and on rank 0 write the artifact's files.

Workers talk to the driver through one relay actor, so that a logged row is no barrier; `ray.train.report` is called
for checkpoints only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from torch import nn

from pipeline.errors import TesseraError
from pipeline.stage import Outcome
from stages.pretrain.config.pretrain import PretrainConfig
from stages.pretrain.launch.artifact import write_artifact
from stages.pretrain.launch.assemble import assemble
from stages.pretrain.launch.continuing import FromKeptState
from stages.pretrain.launch.loading import loader_workers
from stages.pretrain.launch.replay import leaver
from stages.training.checkpoint import TrainingState, is_complete, read_checkpoint, write_checkpoint
from stages.training.loop import train


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
        report: Callable[[dict[str, float]], None] = lambda row: None  # noqa: E731
        if rank == 0:
            relay.start.remote(training.last_step)
            report = relay.push.remote
        leave_replay = leaver(config, job["inputs"], training, job["output"])
        started = FromKeptState(RayCheckpoints(job["run"], rank), job["inputs"], training.last_step)
        state = train(training, started, report, leave_replay)
        if rank != 0:
            return None
        return write_artifact(config, job["inputs"], job["output"], training, state, started), state.curves
    except TesseraError as error:
        # Raised, so that Ray Train ends the other ranks, which may wait for this one in a collective; noted first,
        # so that the workers it then starts again return at once, and the driver says why.
        ray.get(relay.stop.remote(str(error)))
        raise


class RayCheckpoints:
    """Checkpoints through ray.train: rank 0 writes, every rank reports, Ray Train keeps the newest two."""

    def __init__(self, fingerprint: str, rank: int) -> None:
        self.fingerprint, self.rank = fingerprint, rank

    def save(self, method: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState) -> None:
        """Write and report a checkpoint; every rank calls it at the same steps."""
        metrics = {"step": state.step}
        if self.rank != 0:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "checkpoint"
            write_checkpoint(folder, method, optimizer, state, self.fingerprint)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def restore(self, method: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
        """The newest whole checkpoint, loaded; a fresh `TrainingState` where there is none."""
        newest = ray.train.get_checkpoint()
        if newest is None:
            return TrainingState()
        older = [reported.checkpoint for reported in reversed(ray.train.get_all_reported_checkpoints())]
        for checkpoint in [newest, *older]:
            with checkpoint.as_directory() as folder:
                if is_complete(Path(folder)):
                    return read_checkpoint(Path(folder), method, optimizer, self.fingerprint)
        return TrainingState()
