"""What the training loop asks of the thing it trains, and of the batches it trains on.

A pre-training method meets this contract (stages/pretrain/methods/method.py adds views and inputs to it); the loop
knows this file and nothing of what stands behind it.
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
    """Where training stands. `progress` is what schedules are functions of."""

    index: int  # optimiser steps done, 0-based
    total: int  # optimiser steps of the whole training
    steps_per_epoch: int

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.index // self.steps_per_epoch

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1)."""
        return self.index / max(1, self.total)


class TrainingBatch(Protocol):
    """One rank's share of a forward pass, as the loop sees it."""

    image_ids: Tensor  # (B,) int64
    skipped: dict[str, int]  # reason -> images replaced while this batch was made
    problems: dict[str, str]  # key -> reason, of those images

    def __len__(self) -> int:
        """Images of this rank."""

    def to(self, device: torch.device | str) -> Any:
        """The same batch on a device."""

    def watched_images(self) -> Tensor:
        """(B, 3, S, S) normalised images whose features are watched for collapse."""


class Trainable(nn.Module, ABC):
    """A module that computes named loss terms and knows the encoder it trains.

    Everything that must survive a resume (teacher, queues, centres, banks) is a parameter or a buffer.
    Parameters with requires_grad=False (the teacher) are never optimised.
    """

    @abstractmethod
    def compute_terms(self, batch: Any) -> dict[str, Tensor]:
        """Named, unweighted scalar terms, equal on every rank only in expectation.

        Each rank returns its own share's mean, and gradients are averaged over ranks. Statistics that a paper computes
        over the batch (Sinkhorn, centres, volume) are all-reduced (collectives.py).
        """

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """`compute_terms`, so that DistributedDataParallel can wrap the module as it is."""
        return self.compute_terms(batch)

    def start_step(self, step: Step) -> None:
        """Before a step: set teacher temperatures and whatever else follows a schedule."""
        return

    def before_update(self, step: Step) -> None:
        """After backward, before the optimiser: e.g. drop the last layer's gradients in the first epoch."""
        return

    @abstractmethod
    def after_step(self, step: Step) -> None:
        """After the optimiser: move the teacher, push queues, renormalise prototypes."""

    @abstractmethod
    def encoder(self) -> Encoder:
        """What is evaluated and exported: the teacher where there is one."""

    def diagnostics(self) -> dict[str, float]:
        """Cheap numbers about the last step worth a curve: teacher entropy, prototype usage, ..."""
        return {}

    def parameter_groups(self) -> Iterable[nn.Parameter]:
        """What the optimiser trains."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)
