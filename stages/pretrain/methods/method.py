"""The contract of a pre-training method: `Trainable`, which the loop knows, and the method's views and inputs.

A method is registered in the entry-point group `tessera.methods` by its *settings* class
(stages/pretrain/config/method.py). The settings class imports fast and names the method's class; `build` makes the
method.
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
from stages.pretrain.views.sheet import Panel
from stages.training.contract import Step, Trainable

__all__ = ["Method", "Step"]


class Method(Trainable):
    """A way to pre-train: which views it needs, which loss terms it computes, what it does after a step."""

    @classmethod
    def build(
        cls, settings: Any, encoder: Encoder, *, total_steps: int, steps_per_epoch: int, global_batch: int
    ) -> Self:
        """Makes the method from validated settings, around a student encoder.

        Args:
            settings: an instance of the method's own settings class.
            encoder: the student, newly built or loaded.
            total_steps: optimiser steps of the whole training.
            steps_per_epoch: optimiser steps of one epoch.
            global_batch: images of one optimiser step, of all ranks together.

        Returns:
            The method, with its teacher and heads if it has any.

        Raises:
            ValueError: if the method cannot use this encoder.
        """
        return cls(settings, encoder)

    @abstractmethod
    def view_plan(self) -> ViewPlan:
        """Which crops of an image the method needs, with which colour operations, and which tables of the images."""

    def use_sources(self, roles: Sequence[str]) -> None:
        """Receives, once before training, the role of each image source: "objects" or "scenes".

        `Batch.source` is an index into `roles`.
        """
        return

    def use_inputs(self, inputs: Mapping[str, Artifact]) -> None:
        """Receives, once before training, the artifacts of the method's own inputs.

        The keys are the inputs' dotted paths in the method's settings. Tables of images come with the batches and need
        no code here; this is for what a method reads itself, such as an earlier encoder.
        """
        return

    @abstractmethod
    def compute_terms(self, batch: Batch) -> dict[str, Tensor]:
        """The loss terms of one forward pass: name -> scalar, not weighted.

        Each rank returns the mean over its own images, and the loop averages over ranks. Statistics that a paper
        computes over the batch are computed over the images of all ranks (stages/training/collectives.py).
        """

    def preview_panels(self, batch: Batch) -> Sequence[Panel]:
        """What the method makes of these views, for the picture of the first batch (views/sheet.py).

        Called once, in one process, after training: it must not wait for other ranks.
        """
        return ()

    def representation(self) -> nn.Module | None:
        """The module that maps the student's views to features, if it is not the encoder given to `build`; else None.

        DSA, which wraps other methods, reads the representations from this module's forward passes (dsa/method.py).
        MAE returns its own module, because its encoder sees only some patches of the image.
        """
        return None

    def projection(self) -> tuple[nn.Module, int] | None:
        """The module that maps the student's views to projections, and their width; None if there is none.

        DSA's released variant, which compares projections, reads them from this module's forward passes. The settings
        say whether a method has one (`MethodSettings.projects_views`).
        """
        return None
