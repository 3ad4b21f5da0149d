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
from stages.training.launch.interruption import fit
from stages.training.launch.relay import CurveLog, drained, start_relay
from stages.training.launch.work import Launch
from stages.training.settings import LoopSettings


def train_on_ray(launch: Launch, context: Context, curves: CurveLog) -> Outcome:
    """Fit with Ray Train; rank 0 writes the artifact's files."""
    config = launch.config
    gpus_there, cpus_there = (sum(node.get(name, 0) for node in nodes()) for name in ("GPU", "CPU"))
    use_gpu = gpus_there > 0 if config.resources.gpus is None else config.resources.gpus > 0
    counts = config.resources.worker_counts or ((int(gpus_there) if use_gpu else 1),) * 2
    fewest, most = counts
    launch.check_start(context, counts)
    cpus = config.resources.cpus or max(1, int(cpus_there // most))
    if cpus * fewest > cpus_there:
        raise ClusterError(
            f"stages.{context.name}: {fewest} workers with {cpus:g} CPUs each need {cpus * fewest:g}, "
            f"the cluster has {cpus_there:g}: lower resources.workers or resources.cpus"
        )
    relay = start_relay()  # its process comes up while the next lines import
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

    from stages.training.launch.elastic import Reporter, Trainer
    from stages.training.launch.process_group import ProcessGroup

    job = {
        "work": launch.work,
        "loader": launch.loader,
        "config": config.model_dump(mode="json", by_alias=True),
        "inputs": dict(context.inputs),
        "output": context.output,
        "run": context.output.whole,
        "relay": relay,
        "cpus": int(cpus),
        "threads": max(1, int(cpus)),
    }
    trainer = Trainer(
        partial(_worker, job),
        counts=launch.usable_counts(fewest, most),
        relay=relay,
        lost_rank_minutes=config.lost_rank_minutes,
        backend_config=ProcessGroup("nccl" if use_gpu else "gloo", config.lost_rank_minutes),
        scaling_config=ScalingConfig(
            num_workers=most if fewest == most else (fewest, most),
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cpus, **({"GPU": config.resources.gpus or 1} if use_gpu else {})},
        ),
        run_config=RunConfig(
            name=context.output.whole,
            storage_path=context.output.progress_address,
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            callbacks=[Reporter(relay, config.max_failures)],
        ),
    )
    with drained(relay, curves, lambda line: context.say(f"{context.name}: {line}")) as fatal:
        result = fit(trainer, relay)
    if fatal:
        raise StageFailed(fatal[0])
    if result.return_value is None:
        raise StageFailed(f"stages.{context.name}: training ended without a result: {result.error}")
    outcome, rows = result.return_value
    for row in rows:  # what an earlier, interrupted process had logged belongs to this run's record too
        curves.add(row)
    return outcome


def _worker(job: dict[str, Any]) -> tuple[Outcome, list[dict[str, float]]] | None:
    from stages.training.launch.loading import loader_workers, start_ahead

    asked = {"loader_workers": job["config"]["loader_workers"], "steps": 1}
    start_ahead(loader_workers(LoopSettings.model_validate(asked), job["cpus"]), job["loader"])
    from stages.training.launch.worker import work

    return work(job)
