"""What both variants of DSA are: a host, its views and an auxiliary encoder. A variant adds two terms to the host's.

Source: docs/methods.md#dsa.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from pipeline.store.artifact import Artifact
from stages.models.encoder import Encoder
from stages.models.heads import at_least_float32
from stages.pretrain.data.batch import Batch
from stages.pretrain.methods.dsa.settings import DSASettings
from stages.pretrain.methods.dsa.views import FrozenViews, StudentViews
from stages.pretrain.methods.method import Method, Step
from stages.pretrain.views.plan import ViewPlan
from stages.pretrain.views.sheet import Panel


class Regulariser(Method):
    """A host that is heard while it computes its terms. All but `regularise` is the host's."""

    views: StudentViews  # set by the variant: it chooses what is heard

    def __init__(self, settings: DSASettings, host: Method, encoder: Encoder, auxiliary: Encoder | None) -> None:
        super().__init__()
        self.settings = settings
        self.host = host
        self.auxiliary = None if auxiliary is None else FrozenViews(auxiliary, encoder.mean, encoder.std)
        self._watched: dict[str, Tensor] = {}

    @classmethod
    def build(
        cls, settings: DSASettings, encoder: Encoder, *, total_steps: int, steps_per_epoch: int, global_batch: int
    ) -> Self:
        """Builds the host, then the regulariser around it and the frozen auxiliary encoder, if there is one.

        Args:
            settings: DSA's settings, which hold the host's.
            encoder: the student, which the host trains.
            total_steps: optimiser steps of the whole training, for the host.
            steps_per_epoch: optimiser steps of one epoch, for the host.
            global_batch: images of one optimiser step of all ranks, for the host.

        Raises:
            ValueError: if the host cannot use this encoder or batch.
        """
        host = settings.host.as_host().build(
            encoder, total_steps=total_steps, steps_per_epoch=steps_per_epoch, global_batch=global_batch
        )
        return cls(settings, host, encoder, None if settings.auxiliary is None else Encoder.build(settings.auxiliary))

    def image_views(self) -> list[str]:
        """The names of the host's views that show the image itself, not a neighbour."""
        return [spec.name for spec in self.host.view_plan().views if spec.of == "image"]

    def view_plan(self) -> ViewPlan:
        """The host's views, and the table of embeddings if the auxiliary features come from it."""
        plan = self.host.view_plan()
        return replace(plan, tables=(*plan.tables, "embeddings")) if self.settings.embeddings else plan

    def compute_terms(self, batch: Batch) -> dict[str, Tensor]:
        """The host's terms, recording its forward passes, then the variant's two terms on what was recorded."""
        with self.views:
            terms = self.host.compute_terms(batch)
            z_ID, images = self.views.two(batch)
        with torch.autocast(z_ID.device.type, enabled=False):
            return {**terms, **self.regularise(at_least_float32(z_ID), images, batch)}

    @abstractmethod
    def regularise(self, z_ID: Tensor, images: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The variant's two terms.

        Args:
            z_ID: (2B, D) what was heard of both views of the images, the first views before the second.
            images: (2B, 3, S, S) their pixels.
            batch: what they are from.
        """

    # -- everything else is the host's ---------------------------------------------------------------------------

    def preview_panels(self, batch: Batch) -> Sequence[Panel]:
        """The host's."""
        return self.host.preview_panels(batch)

    def use_sources(self, roles: Sequence[str]) -> None:
        """Passes the roles of the image sources on to the host."""
        self.host.use_sources(roles)

    def use_inputs(self, inputs: Mapping[str, Artifact]) -> None:
        """Passes the host's inputs on to it, under their paths in the host's own settings."""
        own = "host."
        self.host.use_inputs({path[len(own) :]: each for path, each in inputs.items() if path.startswith(own)})

    def start_step(self, step: Step) -> None:
        """Lets the host set its schedules."""
        self.host.start_step(step)

    def before_update(self, step: Step) -> None:
        """Lets the host change gradients."""
        self.host.before_update(step)

    def after_step(self, step: Step) -> None:
        """Lets the host move its teacher and queues."""
        self.host.after_step(step)

    def encoder(self) -> Encoder:
        """The host's encoder: DSA adds nothing to what is exported."""
        return self.host.encoder()

    def diagnostics(self) -> dict[str, float]:
        """The host's numbers, the mean anchor score, and the mean over anchors of the largest entry of M."""
        return self.host.diagnostics() | {name: value.item() for name, value in self._watched.items()}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Regulariser:
        """Also moves the auxiliary encoder to the device. It is no submodule, so that it is in no checkpoint."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.auxiliary is not None:
            self.auxiliary.encoder._apply(fn)  # type: ignore[no-untyped-call]
        return self
