"""The training loop: one for all methods, plain PyTorch, no Ray. Read it from top to bottom.

It owns the optimiser, the schedules, mixed precision, clipping, accumulation, checkpoints, the curves and the
weighted sum of terms. Nothing in it asks which method runs. The Ray Train stage wraps it (launch.py), and so do a
plain `python` process and the benchmarks. Under torch.distributed it trains data-parallel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.errors import StageFailed
from stages.pretrain.batch import Batch
from stages.pretrain.checkpoint import Progress
from stages.pretrain.methods.method import Method, Step
from stages.pretrain.optim import build_optimizer, clip_gradients, set_schedule
from stages.pretrain.settings.loop import LoopSettings


class Data(Protocol):
    """What the loop needs of the data: the same batches for the same step numbers, whenever asked."""

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Forward passes start .. stop-1; each batch holds this rank's share of batch_size / accumulate images."""


class Checkpoints(Protocol):
    def save(self, method: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None: ...

    def restore(self, method: nn.Module, optimizer: torch.optim.Optimizer) -> Progress: ...


@dataclass(frozen=True)
class Run:
    """The parts of one training run, as one rank sees them."""

    method: Method
    data: Data
    settings: LoopSettings
    weights: Mapping[str, float]  # term -> weight; terms not named weigh 1
    total_steps: int
    steps_per_epoch: int
    device: torch.device


def train(
    run: Run, checkpoints: Checkpoints, report: Callable[[dict[str, float]], None] = lambda row: None
) -> Progress:
    """Train to the end, from the last checkpoint where there is one.

    Args:
        report: called on every rank with each row of the curves as it is made (means over ranks and steps).

    Returns: the final progress; its `curves` hold every row of the run, those before a resume included.
    Raises: StageFailed when a term is not finite, with its name and step.
    """
    settings, device = run.settings, run.device
    # Convolutions are faster with channels last (ResNet-18 on a CPU by a fifth); other layers do not care.
    method = run.method.to(device).to(memory_format=torch.channels_last).train()
    optimizer = build_optimizer(method, settings.optimizer)
    progress = checkpoints.restore(method, optimizer)
    model: nn.Module = method
    if dist.is_initialized() and dist.get_world_size() > 1:
        # Some steps leave some heads out (a batch without object-centric images), so unused parameters are normal.
        model = nn.parallel.DistributedDataParallel(method, broadcast_buffers=False, find_unused_parameters=True)
    checkpoint_every = settings.checkpoint_every or max(1, run.total_steps // 20)
    window = Window(run)

    passes = run.data.batches(progress.step * settings.accumulate, run.total_steps * settings.accumulate)
    for index in range(progress.step, run.total_steps):
        step = Step(index, run.total_steps, run.steps_per_epoch)
        # One seed a step, not one a run: a resumed run needs no generator states to continue exactly.
        torch.manual_seed(settings.seed * 1_000_003 + index)
        lr, decay = set_schedule(
            optimizer,
            settings.optimizer,
            step=index,
            total=run.total_steps,
            steps_per_epoch=run.steps_per_epoch,
            batch_size=settings.batch_size,
        )
        method.start_step(step)
        for _ in range(settings.accumulate):
            batch = next(passes).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                terms = model(batch)
            total = weighted_sum(terms, run.weights)
            torch.autograd.backward(total / settings.accumulate)
            window.add(batch, terms, total)
        method.before_update(step)
        norm = clip_gradients(method.parameters(), settings.optimizer)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step(step)
        window.end_step(index, norm)

        done = index + 1
        progress.step = done
        must_save = done % checkpoint_every == 0 or done == run.total_steps
        if done % settings.log_every == 0 or must_save:
            row = window.flush(done, {"lr": lr, "weight_decay": decay, **method.diagnostics()})
            progress.curves.append(row)
            for reason, count in window.take_skipped().items():
                progress.skipped[reason] = progress.skipped.get(reason, 0) + count
            report(row)
        if must_save:
            checkpoints.save(method, optimizer, progress)
    return progress


def weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Sum of weight * term over the terms of a step, in float32; a term without a weight weighs 1."""
    if not terms:
        raise ValueError("a method must return at least one term")
    return torch.stack([weights.get(name, 1.0) * term.float() for name, term in terms.items()]).sum()


class Window:
    """Terms since the last logged row, kept on the device so that no step waits for it."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.names: list[str] = []
        self.rows: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.steps: list[int] = []
        self.images = 0
        self.skipped: dict[str, int] = {}
        self.started = time.perf_counter()
        self.pending: list[Tensor] = []

    def add(self, batch: Batch, terms: Mapping[str, Tensor], total: Tensor) -> None:
        """One forward pass."""
        names = [*terms, "total"]
        if self.names and names != self.names:
            raise ValueError(f"terms changed from {self.names} to {names}: a method returns the same terms every step")
        self.names = names
        self.pending.append(torch.stack([*(term.detach().float() for term in terms.values()), total.detach()]))
        self.images += len(batch) * _world_size()
        for reason, count in batch.skipped.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + count

    def end_step(self, index: int, norm: Tensor) -> None:
        self.rows.append(torch.stack(self.pending).mean(0))
        self.norms.append(norm.detach().float())
        self.steps.append(index)
        self.pending = []

    def flush(self, step: int, extra: Mapping[str, float]) -> dict[str, float]:
        """The mean over the window's steps and the ranks, checked for NaN and infinity; empties the window."""
        values_ST = torch.stack(self.rows)
        if _world_size() > 1:
            dist.all_reduce(values_ST)
            values_ST /= _world_size()
        values_ST, norms_S = values_ST.cpu(), torch.stack(self.norms).cpu()
        self._check_finite(values_ST, norms_S)
        seconds = time.perf_counter() - self.started
        row = {"step": float(step), "epoch": step / self.run.steps_per_epoch}
        row |= dict(zip(self.names, values_ST.double().mean(0).tolist(), strict=True))
        row |= {"grad_norm": norms_S.double().mean().item(), **extra, "images_per_s": self.images / seconds}
        self.rows, self.norms, self.steps, self.images = [], [], [], 0
        self.started = time.perf_counter()
        return row

    def take_skipped(self) -> dict[str, int]:
        """Reasons and counts since the last call, over all ranks."""
        taken, self.skipped = self.skipped, {}
        if _world_size() > 1:
            gathered: list[dict[str, int]] = [{} for _ in range(_world_size())]
            dist.all_gather_object(gathered, taken)
            taken = {}
            for counts in gathered:
                for reason, count in counts.items():
                    taken[reason] = taken.get(reason, 0) + count
        return taken

    def _check_finite(self, values_ST: Tensor, norms_S: Tensor) -> None:
        bad_ST = ~values_ST.isfinite()
        if bad_ST.any():
            at, term = (int(i) for i in bad_ST.nonzero()[0])
            raise StageFailed(
                f"term {self.names[term]} is {values_ST[at, term].item()} at step {self.steps[at]}: training stopped "
                "(lower optimizer.lr, set optimizer.clip, or precision: fp32; the last checkpoint is before it)"
            )
        if not norms_S.isfinite().all():
            at = int((~norms_S.isfinite()).nonzero()[0])
            raise StageFailed(
                f"the gradient's norm is {norms_S[at].item()} at step {self.steps[at]} while every term is finite: "
                "training stopped (set optimizer.clip, lower optimizer.lr, or precision: fp32)"
            )


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
