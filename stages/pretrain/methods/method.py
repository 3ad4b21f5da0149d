"""The contract every pre-training method meets: what the loop asks of it, and which views and inputs it wants.

A method is registered under the entry-point group `tessera.methods` by its *settings* class
(stages/pretrain/config/method.py), which imports fast and names the method's class; `build` makes the method.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch import Tensor, nn

from pipeline.store.artifact import Artifact
from stages.models.encoder import Encoder
from stages.pretrain.data.batch import Batch
from stages.pretrain.views.plan import ViewPlan
from stages.training.contract import Step, Trainable

__all__ = ["Method", "Step"]


class Method(Trainable):
    """A way to pre-train: which views it wants, what its terms are, what happens after a step (see `Trainable`)."""

    @classmethod
    def build(
        cls, settings: Any, encoder: Encoder, *, total_steps: int, steps_per_epoch: int, global_batch: int
    ) -> Self:
        """The method of validated settings around a student encoder.

        Args:
            settings: of the method's own settings class.
            encoder: the student, freshly built or loaded.
            total_steps: optimiser steps of the whole training.
            steps_per_epoch: optimiser steps of one epoch.
            global_batch: images of one optimiser step over all ranks.

        Raises:
            ValueError: when the encoder or the batch does not suit the method.
        """
        return cls(settings, encoder)

    @abstractmethod
    def view_plan(self) -> ViewPlan:
        """Crops, photometric operations and tables."""

    def use_sources(self, roles: Sequence[str]) -> None:
        """Once, before training: the role ("objects" or "scenes") of each image source, by `Batch.source`."""
        return

    def use_inputs(self, inputs: Mapping[str, Artifact]) -> None:
        """Once, before training: the artifacts of the method's own inputs, by their path in its settings.

        Tables of images come with the batches; this is for what a method reads itself, such as an earlier encoder.
        """
        return

    @abstractmethod
    def compute_terms(self, batch: Batch) -> dict[str, Tensor]:
        """See `Trainable.compute_terms`."""

    def representation(self) -> nn.Module | None:
        """What turns the student's views into `Features`, where it is not the encoder that `build` was given.

        MAE's sees a part of the image. A regulariser around the method listens to its forward passes (dsa/method.py).
        """
        return None
