"""Runs the loop: on Ray Train workers, or in the driver's own process; then writes the encoder artifact.

Workers talk to the driver through one relay actor, so that a logged row is no barrier; `ray.train.report` is
called for checkpoints only. A run resumes because its Ray Train name is its fingerprint.
"""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.errors import ClusterError, StageFailed, TesseraError
from pipeline.stage import Context, Outcome
from stages.pretrain.launch.assemble import assemble
from stages.pretrain.launch.preview import curves_table, preview_png, views_png
from stages.pretrain.launch.replay import leaver
from stages.pretrain.stage import PretrainConfig
from stages.training.checkpoint import CheckpointFolder, Progress, is_complete, read_checkpoint, write_checkpoint
from stages.training.loop import Run, train


def pretrain(config: PretrainConfig, context: Context) -> Outcome:
    """Train (or continue), save the encoder, its curves and its picture."""
    rows = Rows(context)
    if config.backbone is not None:  # the workers' working folder is not the driver's
        config = config.model_copy(update={"backbone": config.backbone.anywhere()})
    if config.resources.workers == 0:
        folder = context.output.progress_folder / "checkpoints"
        checkpoints = CheckpointFolder(folder, context.fingerprint, say=context.say)
        run = assemble(config, context.inputs, device=_device(), loader_workers=_loader_workers(config, _cpus()))
        rows.total = run.total_steps
        leave_replay = leaver(config, context.inputs, run, str(context.output.progress_folder))
        progress = train(run, checkpoints, rows.add, leave_replay)
    else:
        final = _train_on_ray(config, context, rows)
        run = assemble(config, context.inputs)
        progress = read_checkpoint(final, run.method, None, context.fingerprint)
    for row in progress.curves:  # what an earlier, interrupted process had logged belongs to this run's record too
        rows.add(row)
    return _write(config, context, run, progress)


def _write(config: PretrainConfig, context: Context, run: Run, progress: Progress) -> Outcome:
    encoder = run.method.cpu().eval().encoder()
    with tempfile.TemporaryDirectory() as folder:
        encoder.save(Path(folder), method=config.method.name)
        for file in sorted(Path(folder).iterdir()):
            context.output.put_file(file.name, file)
    context.output.put_file("curves.json", json.dumps(progress.curves).encode())
    context.output.put_file("curves.parquet", curves_table(progress.curves))
    context.output.put_file("views.png", views_png(run.data, run.method.view_plan(), encoder))
    context.output.put_file("preview.png", preview_png(encoder, progress.curves, config, context.inputs))
    last = progress.curves[-1]
    terms = [name for name in (*config.method.term_weights(), "total") if name in last]
    return Outcome(
        metrics={**{name: last[name] for name in terms}, "images_per_s": last["images_per_s"]},
        counts={"steps": progress.step, **{f"skipped: {reason}": n for reason, n in progress.skipped.items()}},
        preview="preview.png",
    )


class Rows:
    """Passes each row of the curves on to the progress bar and to MLflow, once, whoever sends it how often."""

    def __init__(self, context: Context) -> None:
        self.context, self.total = context, 0
        self.seen: set[float] = set()

    def add(self, row: dict[str, float]) -> None:
        if row["step"] in self.seen:
            return
        self.seen.add(row["step"])
        self.context.log_metrics({k: v for k, v in row.items() if k != "step"}, int(row["step"]))
        if self.total:
            self.context.report_progress(row["step"], self.total, "steps")


# --- Ray Train --------------------------------------------------------------------------------------------------


class Relay:
    """Actor between rank 0 and the driver: rows of the curves, and why training had to stop."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.total = 0
        self.fatal: str | None = None

    def start(self, total: int) -> None:
        self.total = total

    def push(self, row: dict[str, float]) -> None:
        self.rows.append(row)

    def stop(self, why: str) -> None:
        self.fatal = why

    def stopped(self) -> bool:
        return self.fatal is not None

    def drain(self) -> tuple[list[dict[str, float]], int, str | None]:
        rows, self.rows = self.rows, []
        return rows, self.total, self.fatal


class RayCheckpoints:
    """Checkpoints through ray.train: rank 0 writes, every rank reports, Ray Train keeps the newest two."""

    def __init__(self, run: str, rank: int) -> None:
        self.run, self.rank = run, rank

    def save(self, method: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        import ray.train

        metrics = {"step": progress.step}
        if self.rank != 0:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "checkpoint"
            write_checkpoint(folder, method, optimizer, progress, self.run)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def restore(self, method: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        import ray.train

        newest = ray.train.get_checkpoint()
        if newest is None:
            return Progress()
        older = [reported.checkpoint for reported in reversed(ray.train.get_all_reported_checkpoints())]
        for checkpoint in [newest, *older]:
            with checkpoint.as_directory() as folder:
                if is_complete(Path(folder)):
                    return read_checkpoint(Path(folder), method, optimizer, self.run)
        return Progress()


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
            loader_workers=_loader_workers(config, job["cpus"]),
        )
        report: Callable[[dict[str, float]], None] = lambda row: None  # noqa: E731
        if rank == 0:
            relay.start.remote(run.total_steps)
            report = relay.push.remote
        leave_replay = leaver(config, job["inputs"], run, job["progress"])
        train(run, RayCheckpoints(job["run"], rank), report, leave_replay)
    except TesseraError as error:
        # Raised, so that Ray Train ends the other ranks, which may wait for this one in a collective; noted first,
        # so that the workers it then starts again return at once, and the driver says why.
        ray.get(relay.stop.remote(str(error)))
        raise


def _train_on_ray(config: PretrainConfig, context: Context, rows: Rows) -> Path:
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
            "progress": context.output.progress_address,
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
    with _drained(relay, rows) as fatal:
        result = trainer.fit()
    if fatal:
        raise StageFailed(fatal[0])
    if result.checkpoint is None:
        raise StageFailed(f"stages.{context.name}: training ended without a checkpoint: {result.error}")
    return Path(result.checkpoint.to_directory(str(context.output.scratch / "final")))


@contextmanager
def _drained(relay: Any, rows: Rows) -> Iterator[list[str]]:
    """Empties the relay twice a second while the body runs; yields a list that holds the reason of a stop, if any."""
    import ray

    fatal: list[str] = []
    stop = threading.Event()

    def drain() -> None:
        new, rows.total, why = ray.get(relay.drain.remote())
        for row in new:
            rows.add(row)
        if why and not fatal:
            fatal.append(why)

    def poll() -> None:
        while not stop.wait(0.5):
            drain()

    thread = threading.Thread(target=poll, name="training-relay", daemon=True)
    thread.start()
    try:
        yield fatal
    finally:
        stop.set()
        thread.join()
        drain()


def _cpus() -> int:
    return torch.get_num_threads()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _loader_workers(config: PretrainConfig, cpus: int) -> int:
    """Loader processes a worker: on a CPU one is enough to hide the decoding, on a GPU all cores feed it."""
    if config.loader_workers is not None:
        return config.loader_workers
    if torch.cuda.is_available():
        return min(8, max(1, cpus - 1))
    return 1 if cpus > 1 else 0
