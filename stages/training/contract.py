"""What the training loop (loop.py) asks of the thing it trains, and of the batches it trains on.

The loop knows this file and nothing of the stages that use it. A pre-training method meets this contract and adds
views and inputs to it (stages/pretrain/methods/method.py).

In every step the loop calls `start_step`, then `compute_terms` and a backward pass once for each of the step's
batches, then `before_update`, the optimiser, and `after_step`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stages.models.encoder import Encoder


@dataclass(frozen=True)
class Step:
    """Where training stands: the step that is being made."""

    index: int  # of the step, 0-based: the optimiser steps done before it
    total: int  # optimiser steps of the whole training
    steps_per_epoch: int

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.index // self.steps_per_epoch

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1): what schedules are functions of."""
        return self.index / max(1, self.total)


class TrainingBatch(Protocol):
    """One rank's share of a forward pass, as the loop sees it: B images, of S pixels a side where they are watched."""

    image_ids: Tensor  # (B,) int64
    skipped: dict[str, int]  # reason -> images replaced while this batch was made
    problems: dict[str, str]  # key -> reason, of those images

    def __len__(self) -> int:
        """B."""

    def to(self, device: torch.device | str) -> Any:
        """The same batch on a device."""

    def watched_images(self) -> Tensor:
        """(B, 3, S, S) normalised images whose features are watched for collapse (watch.py)."""


class Trainable(nn.Module, ABC):
    """A module that computes named loss terms and knows the encoder it trains.

    Everything that must survive a resume (a teacher, queues, centres) is a parameter or a buffer. The optimiser gets
    the parameters with requires_grad=True; a teacher's have False.
    """

    @abstractmethod
    def compute_terms(self, batch: Any) -> dict[str, Tensor]:
        """Named, unweighted scalar terms of a batch; the same names in every step.

        Each rank returns the mean over its own images; the loop weighs and sums the terms and averages the gradients
        over ranks. A statistic that belongs to the whole batch (Sinkhorn, centres, volume) must be computed over all
        ranks (collectives.py).
        """

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """The same as `compute_terms`: DistributedDataParallel wraps a module's forward."""
        return self.compute_terms(batch)

    def start_step(self, step: Step) -> None:
        """Before the step's first forward pass: set what follows a schedule, e.g. a teacher's temperature."""
        return

    def before_update(self, step: Step) -> None:
        """After the backward passes, before clipping and the optimiser: change gradients, e.g. freeze a layer."""
        return

    @abstractmethod
    def after_step(self, step: Step) -> None:
        """After the optimiser, with all gradients dropped: move a teacher, fill queues, renormalise prototypes."""

    @abstractmethod
    def encoder(self) -> Encoder:
        """What is evaluated and exported: of a student and its moving average, one of the two."""

    def diagnostics(self) -> dict[str, float]:
        """Numbers about the last forward pass that are worth a curve, asked for in the steps that are logged.

        "teacher_entropy" and "assignment_entropy" (mean entropy of the targets, in nats) are watched for collapse.
        """
        return {}

    def share_of_lr(self, name: str) -> float:
        """Of a parameter, by its dotted name: its learning rate over the optimiser's (layer-wise decay)."""
        return 1.0

    def undecayed(self, name: str) -> bool:
        """Whether a parameter has no weight decay though its shape is that of one that has (a position table)."""
        return False

    def trained_parameters(self) -> Iterable[nn.Parameter]:
        """The parameters that the optimiser changes."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)
