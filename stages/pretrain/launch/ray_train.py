"""The driver's side of a training on Ray Train: what it asks for, and what it makes of the end.

Imports no torch: driver and Ray Train's controller only start the workers (worker.py), and on a small machine every
second of an import in them is a second until the first step. A training resumes because its Ray Train name is the
fingerprint of the whole training.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from pipeline.errors import ClusterError, StageFailed
from pipeline.stage import Context, Outcome, nodes
from stages.pretrain.config.pretrain import PretrainConfig
from stages.pretrain.fit import check_start
from stages.pretrain.launch.relay import CurveLog, Relay, drained


def train_on_ray(config: PretrainConfig, context: Context, curves: CurveLog) -> Outcome:
    """Fit with Ray Train; rank 0 writes the artifact's files."""
    import ray

    gpus_there, cpus_there = (sum(node.get(name, 0) for node in nodes()) for name in ("GPU", "CPU"))
    use_gpu = gpus_there > 0 if config.resources.gpus is None else config.resources.gpus > 0
    workers = config.resources.workers or (int(gpus_there) if use_gpu else 1)
    check_start(config, context, workers)
    cpus = config.resources.cpus or max(1, int(cpus_there // workers))
    if cpus * workers > cpus_there:
        raise ClusterError(
            f"stages.{context.name}: {workers} workers with {cpus:g} CPUs each need {cpus * workers:g}, "
            f"the cluster has {cpus_there:g}: lower resources.workers or resources.cpus"
        )
    relay = ray.remote(num_cpus=0)(Relay).remote()  # its process comes up while the next lines import
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from stages.pretrain.launch.process_group import ProcessGroup

    job = {
        "config": config.model_dump(mode="json", by_alias=True),
        "inputs": dict(context.inputs),
        "output": context.output,
        "run": context.output.whole,
        "relay": relay,
        "cpus": int(cpus),
        "threads": max(1, int(cpus)),
    }
    trainer = DataParallelTrainer(
        partial(_worker, job),
        backend_config=ProcessGroup("nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cpus, **({"GPU": config.resources.gpus or 1} if use_gpu else {})},
        ),
        run_config=RunConfig(
            name=context.output.whole,
            storage_path=context.output.progress_address,
            failure_config=FailureConfig(max_failures=3),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    with drained(relay, curves) as fatal:
        result = trainer.fit()
    if fatal:
        raise StageFailed(fatal[0])
    if result.return_value is None:
        raise StageFailed(f"stages.{context.name}: training ended without a result: {result.error}")
    outcome, rows = result.return_value
    for row in rows:  # what an earlier, interrupted process had logged belongs to this run's record too
        curves.add(row)
    return outcome


def _worker(job: dict[str, Any]) -> tuple[Outcome, list[dict[str, float]]] | None:
    from stages.pretrain.launch.loading import loader_workers, start_ahead

    start_ahead(loader_workers(PretrainConfig.model_validate(job["config"]), job["cpus"]))
    from stages.pretrain.launch.worker import work

    return work(job)
