"""The contract every pre-training method meets. The loop knows this file and no method by name.

A method is registered under the entry-point group `tessera.methods` by its *settings* class (see
`MethodSettings`), which imports fast; `build` imports the method itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from stages.models.encoder import Encoder
from stages.pretrain.data.batch import Batch
from stages.pretrain.views.plan import ViewPlan

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact


@dataclass(frozen=True)
class Step:
    """Where training stands. `progress` is what schedules are functions of."""

    index: int  # optimiser steps done, 0-based
    total: int  # optimiser steps of the whole run
    steps_per_epoch: int

    @property
    def epoch(self) -> int:
        return self.index // self.steps_per_epoch

    @property
    def progress(self) -> float:
        return self.index / max(1, self.total)


class Method(nn.Module, ABC):
    """A way to pre-train: which views it wants, what its terms are, what happens after a step.

    Everything that must survive a resume (teacher, queues, centres, banks) is a parameter or a buffer.
    Parameters with requires_grad=False (the teacher) are never optimised.
    """

    @abstractmethod
    def view_plan(self) -> ViewPlan:
        """Crops, photometric operations and tables."""

    def use_sources(self, roles: Sequence[str]) -> None:
        """Once, before training: the role ("objects" or "scenes") of each image source, by `Batch.source`."""
        return

    def use_inputs(self, inputs: Mapping[str, Artifact]) -> None:
        """Once, before training: the artifacts of the method's own inputs, by their path in its settings. Tables of
        images come with the batches; this is for what a method reads itself, such as an earlier encoder."""
        return

    @abstractmethod
    def compute_terms(self, batch: Batch) -> dict[str, Tensor]:
        """Named, unweighted scalar terms, equal on every rank only in expectation: each rank returns its own
        share's mean, and gradients are averaged over ranks. Statistics that the paper computes over the batch
        (Sinkhorn, centres, volume) are all-reduced (collectives.py)."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """So that DistributedDataParallel can wrap a method as it is."""
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

    def representation(self) -> nn.Module | None:
        """What turns the student's views into `Features`, where it is not the encoder that `build` was given (MAE's
        sees a part of the image). A regulariser around the method listens to its forward passes (dsa.py)."""
        return None

    def diagnostics(self) -> dict[str, float]:
        """Cheap numbers about the last step worth a curve: teacher entropy, prototype usage, ..."""
        return {}

    def parameter_groups(self) -> Iterable[nn.Parameter]:
        """What the optimiser trains."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)
