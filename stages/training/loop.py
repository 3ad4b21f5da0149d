"""The training loop: plain PyTorch, no Ray, the same for everything that meets contract.py. Read it from top to bottom.

It owns the optimiser, the schedules, mixed precision, clipping, accumulation, checkpoints, the curves and the
weighted sum of terms. It never asks what it trains. A stage wraps it, in Ray Train's workers or in a plain process
(stages/training/launch). Under torch.distributed it trains data-parallel: one rank a process.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from pipeline.errors import StageFailed
from stages.training.checkpoint import TrainingState
from stages.training.collectives import all_reduce_mean, gather_objects, highest, rank, world_size
from stages.training.contract import Step, Trainable, TrainingBatch
from stages.training.notice import Notice
from stages.training.optim import build_optimizer, clip_gradients, set_schedule
from stages.training.pace import Pace, guess_seconds
from stages.training.settings import LoopSettings, weight_of
from stages.training.sharding import Sharded, shard
from stages.training.watch import Watch, not_finite

MAX_PROBLEMS = 100  # skipped images that are listed by name; all of them are counted


class Data(Protocol):
    """What the loop needs of the data: the same batches for the same step numbers, whenever asked."""

    def batches(self, start: int, stop: int) -> Iterator[TrainingBatch]:
        """Forward passes start .. stop-1; each batch holds this rank's share of batch_size / accumulate images."""


class Checkpoints(Protocol):
    """What the loop needs of checkpoints: `CheckpointFolder` on a local disk, or what a launcher brings."""

    def save(self, method: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState) -> None:
        """Keep this state; called on every rank."""

    def restore(self, method: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
        """Load the newest whole checkpoint into both; a fresh `TrainingState` where there is none."""


class TrainingInterrupted(Exception):
    """A rank was told to leave; the training is saved as it stands after `step` steps."""

    def __init__(self, step: int) -> None:
        super().__init__(f"training was told to stop; step {step} is saved")
        self.step = step


@dataclass(frozen=True)
class Training:
    """The parts of one training, as one rank sees them."""

    method: Trainable  # what is trained
    data: Data
    settings: LoopSettings
    weights: Mapping[str, float]  # term -> weight; a term that is not named weighs 1
    total_steps: int  # optimiser steps
    steps_per_epoch: int
    device: torch.device

    @property
    def last_step(self) -> int:
        """The number of steps after which it stops: all, or `stop_at`."""
        return min(self.total_steps, self.settings.stop_at or self.total_steps)


@dataclass(frozen=True)
class BadStep:
    """A step after which training cannot go on, seen before the optimiser has changed any parameter."""

    step: int  # its index, 0-based
    why: str  # a sentence for the user
    image_ids: list[Tensor]  # of this rank's share: one (B,) tensor for each forward pass
    optimizer: torch.optim.Optimizer


RowCallback = Callable[[dict[str, float]], None]
LeaveReplay = Callable[[BadStep], str]
Notices = Callable[[], Notice]


def train(
    training: Training,
    checkpoints: Checkpoints,
    report_row: RowCallback = lambda row: None,
    leave_replay: LeaveReplay = lambda bad: "",
    notices: Notices = lambda: Notice.NONE,
) -> TrainingState:
    """Train to the end or to `stop_at`, from the last checkpoint where there is one.

    Args:
        training: what to train, on which data, how; its method is moved to the device and changed in place.
        checkpoints: where to continue from, and where to save to.
        report_row: called on every rank with each row of the curves as it is made (means over ranks and steps).
        leave_replay: called on every rank when a step has gone wrong; keeps what is needed to repeat the step alone
            and returns a sentence that tells the user how.
        notices: asked on every rank in every step, and acted on at the step's end; it answers SAVE once for a warning.

    Returns:
        The final state; its `curves` hold every row, those before a resume included.

    Raises:
        StageFailed: when a term or its gradient is not finite, or the features have collapsed (watch.py); when the
            last checkpoint is beyond the step at which this training should stop.
        TrainingInterrupted: when a rank was told to leave.
    """
    settings, device = training.settings, training.device
    sharded = settings.strategy == "fsdp2" and world_size() > 1
    # FSDP2 takes the parameters from the CPU to the device share by share, and in the usual memory layout.
    method = training.method.to("cpu" if sharded else device).train()
    if not sharded:  # convolutions are faster (ResNet-18 on a CPU by a fifth), other layers do not care
        method.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(method, settings.optimizer)
    state = checkpoints.restore(method, optimizer)
    if state.step > training.last_step:
        raise StageFailed(
            f"stop_at: this training has gone on to step {state.step} already, beyond {training.last_step} "
            "(give a greater stop_at, or leave it out)"
        )
    model: nn.Module = method
    if sharded:
        model, optimizer = shard(method, optimizer, settings.optimizer, device)
    elif world_size() > 1:
        # A step may use only some of the parameters (a term that has nothing to say about this batch).
        model = nn.parallel.DistributedDataParallel(method, broadcast_buffers=False, find_unused_parameters=True)
    if [*state.worlds.values()][-1:] != [world_size()]:
        state.worlds[state.step] = world_size()
    window, watch = Window(training), Watch(settings.watch, training.weights)
    if state.unlogged and state.curves and state.curves[-1]["step"] == state.step < training.last_step:
        state.curves.pop()  # made only because training stopped there; its steps belong to the next regular row
    window.take_up(state.unlogged)
    watch.low = dict(state.low)
    pace = Pace(settings, guess_seconds(method, optimizer))
    begun = time.monotonic() - state.seconds

    passes = training.data.batches(state.step * settings.accumulate, training.last_step * settings.accumulate)
    for index in range(state.step, training.last_step):
        step = Step(index, training.total_steps, training.steps_per_epoch)
        lr, decay = set_schedule(
            optimizer,
            settings.optimizer,
            step=index,
            total=training.total_steps,
            steps_per_epoch=training.steps_per_epoch,
            batch_size=settings.batch_size,
        )
        batch = compute_gradients(training, model, step, passes, window, watch)
        method.before_update(step)
        norm = clip_gradients(method.parameters(), settings.optimizer)
        done = index + 1
        last = done == training.last_step
        regular = done % settings.log_every == 0
        logged = regular or last
        seen = watch.look(method, batch, precision=settings.precision) if logged else {}
        # One exchange between the ranks a step: is a number not finite, does rank 0 want a checkpoint, must one leave?
        values = torch.stack(window.pending)
        mine = torch.tensor([float(rank() == 0 and pace.due(done)), float(notices())], device=device)
        bad, due, notice = highest(torch.cat([not_finite(values, norm)[None], mine]))
        # Before the optimiser changes anything: a replay needs the parameters that this step had.
        if wrong := watch.wrong(index, window.names, values, norm, seen, finite=not bad):
            how = leave_replay(BadStep(index, wrong, window.image_ids, optimizer))
            raise StageFailed(f"{wrong}: training stopped. {how}".rstrip())
        update(method, optimizer, step)
        window.end_step(norm)

        state.step = done
        state.unlogged = window.unlogged() if last and not regular else {}
        if logged:
            row = window.flush(done, {"lr": lr, "weight_decay": decay, **seen})
            state.curves.append(row)
            window.hand_over_skipped(state)
            report_row(row)
        if due or notice or last:
            state.seconds = time.monotonic() - begun
            save(checkpoints, method, optimizer, state, window, watch, pace)
            state.seconds = time.monotonic() - begun
        if notice == Notice.LEAVE and not last:
            raise TrainingInterrupted(done)
    return state


def save(
    checkpoints: Checkpoints,
    method: Trainable,
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
    window: Window,
    watch: Watch,
    pace: Pace,
) -> None:
    """Make a checkpoint of where training stands, and tell the pace what it took; every rank calls it.

    Args:
        checkpoints: take it.
        method: what is trained.
        optimizer: of it.
        state: brought up to date here.
        window: the steps since the last row: they are kept too, so that a resumed training logs the same rows.
        watch: likewise its counts.
        pace: decides when the next one is due.
    """
    started = time.monotonic()
    window.hand_over_skipped(state)
    state.unlogged, state.low = state.unlogged or window.unlogged(), dict(watch.low)
    checkpoints.save(method, optimizer, state)
    seconds = time.monotonic() - started
    state.saves, state.saving_seconds = state.saves + 1, state.saving_seconds + seconds
    pace.saved(seconds)


def compute_gradients(
    training: Training, model: nn.Module, step: Step, passes: Iterator[TrainingBatch], window: Window, watch: Watch
) -> TrainingBatch:
    """The forward and backward passes of one step: gradients end up in the parameters, terms in the window.

    Args:
        training: whose method, weights and settings these are.
        model: the method, or the DistributedDataParallel around it.
        step: which step it is.
        passes: gives one batch for each forward pass of the step.
        window: takes each pass's terms and image ids.
        watch: measures the terms' gradients in the steps in which that is due.

    Returns:
        The last pass's batch.
    """
    settings, method = training.settings, training.method
    # A new seed for every step: a resumed training continues exactly without stored generator states.
    torch.manual_seed(settings.seed * 1_000_003 + step.index)
    method.start_step(step)
    for nth in range(settings.accumulate):
        batch = next(passes).to(training.device)
        terms, total = compute_total(model, batch, training.weights, precision=settings.precision)
        # With FSDP2 the gradients of single terms cannot be had: autograd knows the gathered parameters only.
        last = nth == settings.accumulate - 1
        if last and watch.gradients_due(step.index) and not isinstance(model, Sharded):
            window.of_terms |= watch.gradient_norms(terms, method.trained_parameters())
        torch.autograd.backward(total / settings.accumulate)
        window.add(batch, terms, total)
    return batch


def compute_total(
    model: nn.Module, batch: TrainingBatch, weights: Mapping[str, float], *, precision: Literal["fp32", "bf16"]
) -> tuple[dict[str, Tensor], Tensor]:
    """One forward pass.

    Args:
        model: a `Trainable`, or the DistributedDataParallel around one.
        batch: on the model's device.
        weights: term -> weight; a term that is not named weighs 1.
        precision: "bf16" runs the pass under autocast.

    Returns:
        The unweighted terms, and their weighted sum in float32, whose gradient is the step's.
    """
    with torch.autocast(batch.image_ids.device.type, torch.bfloat16, enabled=precision == "bf16"):
        terms: dict[str, Tensor] = model(batch)
    return terms, weighted_sum(terms, weights)


def update(method: Trainable, optimizer: torch.optim.Optimizer, step: Step) -> None:
    """The end of a step: move the parameters, drop their gradients, then what the method does after a step."""
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    method.after_step(step)


def weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Sum of weight * term over the terms of a forward pass, in float32; a term without a weight weighs 1.

    Raises:
        ValueError: when there is no term.
    """
    if not terms:
        raise ValueError("a method must return at least one term")
    return torch.stack([weight_of(weights, name) * term.float() for name, term in terms.items()]).sum()


class Window:
    """The steps since the last logged row. Terms stay on the device, so that no step waits for their values."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.names: list[str] = []  # of the terms, and "total" last
        self.rows: list[Tensor] = []  # one a finished step: (terms,) values, the mean over its forward passes
        self.norms: list[Tensor] = []  # one a finished step: norm of the whole gradient
        self.of_terms: dict[str, float] = {}  # the newest gradient norms and weights of single terms
        self.images = 0  # of all ranks
        self.skipped: Counter[str] = Counter()  # reason -> images of this rank
        self.problems: dict[str, str] = {}  # key -> reason
        self.started = time.perf_counter()
        self.pending: list[Tensor] = []  # one a forward pass of the step under way: (terms,) values
        self.image_ids: list[Tensor] = []  # and its (B,) images

    def add(self, batch: TrainingBatch, terms: Mapping[str, Tensor], total: Tensor) -> None:
        """Take in one forward pass.

        Raises:
            ValueError: when the names of the terms differ from those of the passes before.
        """
        names = [*terms, "total"]
        if self.names and names != self.names:
            raise ValueError(f"terms changed from {self.names} to {names}: a method returns the same terms every step")
        self.names = names
        self.pending.append(torch.stack([*(term.detach().float() for term in terms.values()), total.detach()]))
        self.image_ids.append(batch.image_ids)
        self.images += len(batch) * world_size()
        self.skipped.update(batch.skipped)
        self.problems.update(batch.problems)

    def end_step(self, norm: Tensor) -> None:
        """Close the step under way; `norm` is that of its whole gradient."""
        self.rows.append(torch.stack(self.pending).mean(0))
        self.norms.append(norm.detach().float())
        self.pending, self.image_ids = [], []

    def flush(self, step: int, extra: Mapping[str, float]) -> dict[str, float]:
        """A row of the curves: means over the window's steps and the ranks, and `extra`. Empties the window."""
        values_ST, norms_S = all_reduce_mean(torch.stack(self.rows)).cpu(), torch.stack(self.norms).cpu()
        seconds = time.perf_counter() - self.started
        row = {"step": float(step), "epoch": step / self.training.steps_per_epoch}
        row |= dict(zip(self.names, values_ST.double().mean(0).tolist(), strict=True))
        row |= {"grad_norm": norms_S.double().mean().item(), **self.of_terms, **extra}
        row["images_per_s"] = self.images / seconds
        self.rows, self.norms, self.of_terms, self.images = [], [], {}, 0
        self.started = time.perf_counter()
        return row

    def unlogged(self) -> dict[str, Any]:
        """The steps since the last row, as means over the ranks in JSON's types; every rank calls it."""
        if not self.rows:
            return {}
        return {
            "names": self.names,
            "rows": all_reduce_mean(torch.stack(self.rows)).tolist(),
            "norms": torch.stack(self.norms).tolist(),
            "of_terms": self.of_terms,
            "images": self.images,
            "seconds": time.perf_counter() - self.started,
        }

    def take_up(self, kept: Mapping[str, Any]) -> None:
        """Go on from what `unlogged` gave in an earlier process, so that the next row is the same as without a stop."""
        if not kept:
            return
        device = self.training.device
        self.names, self.of_terms, self.images = kept["names"], dict(kept["of_terms"]), kept["images"]
        self.rows = [*torch.tensor(kept["rows"], device=device)]
        self.norms = [*torch.tensor(kept["norms"], device=device)]
        self.started -= kept["seconds"]

    def hand_over_skipped(self, state: TrainingState) -> None:
        """Move what all ranks have skipped since the last call into `state`, the same on every rank."""
        for skipped, problems in gather_objects((self.skipped, self.problems)):
            for reason, count in skipped.items():
                state.skipped[reason] = state.skipped.get(reason, 0) + count
            for key, reason in problems.items():
                if len(state.problems) < MAX_PROBLEMS:
                    state.problems.setdefault(key, reason)
        self.skipped, self.problems = Counter(), {}
