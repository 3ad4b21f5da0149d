"""The loop on Ray Train workers: fit, checkpoints through `ray.train`, and what each worker runs.

Workers talk to the driver through one relay actor, so that a logged row is no barrier; `ray.train.report` is
called for checkpoints only. A training resumes because its Ray Train name is its fingerprint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.errors import ClusterError, StageFailed, TesseraError
from pipeline.stage import Context
from stages.pretrain.config.pretrain import PretrainConfig
from stages.pretrain.launch.assemble import assemble, loader_workers
from stages.pretrain.launch.relay import CurveLog, Relay, drained
from stages.pretrain.launch.replay import leaver
from stages.training.checkpoint import TrainingState, is_complete, read_checkpoint, write_checkpoint
from stages.training.loop import train


def train_on_ray(config: PretrainConfig, context: Context, rows: CurveLog) -> Path:
    """Fit with Ray Train; returns a local folder with the final checkpoint."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpus_there, cpus_there = ray.cluster_resources().get("GPU", 0), ray.cluster_resources().get("CPU", 1)
    use_gpu = gpus_there > 0 if config.resources.gpus is None else config.resources.gpus > 0
    workers = config.resources.workers or (int(gpus_there) if use_gpu else 1)
    cpus = config.resources.cpus or max(1, int(cpus_there // workers))
    if cpus * workers > cpus_there:
        raise ClusterError(
            f"stages.{context.name}: {workers} workers with {cpus:g} CPUs each need {cpus * workers:g}, "
            f"the cluster has {cpus_there:g}: lower resources.workers or resources.cpus"
        )
    relay = ray.remote(num_cpus=0)(Relay).remote()
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "config": config.model_dump(mode="json", by_alias=True),
            "inputs": dict(context.inputs),
            "run": context.fingerprint,
            "output": context.output,
            "relay": relay,
            "cpus": int(cpus),
            "threads": max(1, int(cpus)),
        },
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cpus, **({"GPU": config.resources.gpus or 1} if use_gpu else {})},
        ),
        run_config=RunConfig(
            name=context.fingerprint,
            storage_path=context.output.progress_address,
            failure_config=FailureConfig(max_failures=3),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    with drained(relay, rows) as fatal:
        result = trainer.fit()
    if fatal:
        raise StageFailed(fatal[0])
    if result.checkpoint is None:
        raise StageFailed(f"stages.{context.name}: training ended without a checkpoint: {result.error}")
    return Path(result.checkpoint.to_directory(str(context.output.scratch / "final")))


def _worker(job: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    import ray.train
    import ray.train.torch

    config, relay = PretrainConfig.model_validate(job["config"]), job["relay"]
    if ray.get(relay.stopped.remote()):
        return
    torch.set_num_threads(job["threads"])
    rank, world_size = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    try:
        run = assemble(
            config,
            job["inputs"],
            rank=rank,
            world_size=world_size,
            device=ray.train.torch.get_device(),
            loader_workers=loader_workers(config, job["cpus"]),
        )
        report: Callable[[dict[str, float]], None] = lambda row: None  # noqa: E731
        if rank == 0:
            relay.start.remote(run.total_steps)
            report = relay.push.remote
        leave_replay = leaver(config, job["inputs"], run, job["output"])
        train(run, RayCheckpoints(job["run"], rank), report, leave_replay)
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
        import ray.train

        metrics = {"step": state.step}
        if self.rank != 0:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "checkpoint"
            write_checkpoint(folder, method, optimizer, state, self.fingerprint)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def restore(self, method: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
        import ray.train

        newest = ray.train.get_checkpoint()
        if newest is None:
            return TrainingState()
        older = [reported.checkpoint for reported in reversed(ray.train.get_all_reported_checkpoints())]
        for checkpoint in [newest, *older]:
            with checkpoint.as_directory() as folder:
                if is_complete(Path(folder)):
                    return read_checkpoint(Path(folder), method, optimizer, self.fingerprint)
        return TrainingState()
