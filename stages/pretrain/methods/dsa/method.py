"""DSA: a regulariser around any other method, its host. The equation numbers are the paper's.

Source: docs/methods.md#dsa.

The host makes forward passes of the student. DSA records the representations of two views of every image from them, and
adds two terms to the host's own.

Shape legend: B images of this rank, I its 2B views, J the 2N views of all ranks, D width of a
representation, Da width of an auxiliary feature, E neighbours, H hidden units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from pipeline.store.artifact import Artifact
from stages.models.encoder import Encoder
from stages.models.heads import at_least_float32
from stages.pretrain.data.batch import Batch
from stages.pretrain.methods.dsa.losses.dsa_arranging import (
    arrange,
    arranging_loss,
    constraint_loss,
    pair_distances,
    pair_scores,
)
from stages.pretrain.methods.dsa.losses.dsa_scoring import connection_scores, neighbourhood, prior_similarity
from stages.pretrain.methods.dsa.settings import DSASettings
from stages.pretrain.methods.method import Method, Step
from stages.pretrain.views.plan import ViewPlan
from stages.training.collectives import gather, gather_with_gradient, rank, world_size


class DSA(Method):
    """A host and two more terms: dsa_am (L_AM^s, Eq. 16) and dsa_con (L_con, Eq. 13)."""

    def __init__(self, settings: DSASettings, host: Method, encoder: Encoder, auxiliary: Encoder | None) -> None:
        super().__init__()
        self.settings = settings
        self.host = host
        width = encoder.vector_width  # the host may have widened it, as CoTAP's filter does
        self.arranger = Arranger(width, settings.hidden or width)
        of_the_image = [spec.name for spec in host.view_plan().views if spec.of == "image"]
        self.views = StudentViews(host.representation() or encoder, of_the_image)
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

    def view_plan(self) -> ViewPlan:
        """The host's views, and the table of embeddings if the auxiliary features come from it."""
        plan = self.host.view_plan()
        return replace(plan, tables=(*plan.tables, "embeddings")) if self.settings.embeddings else plan

    def compute_terms(self, batch: Batch) -> dict[str, Tensor]:
        """The host's terms, recording its forward passes, then DSA's two terms on what was recorded."""
        with self.views:
            terms = self.host.compute_terms(batch)
            z_ID, images = self.views.two(batch)
        with torch.autocast(z_ID.device.type, enabled=False):
            return {**terms, **self._regularise(at_least_float32(z_ID), self._auxiliary_features(batch, images))}

    def _auxiliary_features(self, batch: Batch, images: Tensor) -> Tensor:
        """z~ of the same views, (I, Da), of length 1. From a table, both views of an image get the whole image's."""
        if self.auxiliary is not None:
            return self.auxiliary(images)
        embedding_BD = batch.extras["embedding"]
        return functional.normalize(torch.cat([embedding_BD, embedding_BD]), dim=1)

    def _regularise(self, z_ID: Tensor, auxiliary_ID: Tensor) -> dict[str, Tensor]:
        """DSA's two terms from the representations and the auxiliary features of the same views."""
        settings = self.settings
        z_JD, auxiliary_JD = gather_with_gradient(z_ID), gather(auxiliary_ID).to(z_ID.dtype)
        mine = slice(rank() * len(z_ID), (rank() + 1) * len(z_ID))  # this rank's anchors among all views

        # Scoring module (Eq. 11, 12, 14, 15): what the auxiliary encoder says, without gradient.
        near_JJ = pair_distances(auxiliary_JD, auxiliary_JD)
        prior_IJ = prior_similarity(near_JJ[mine], tau=settings.tau_prior)
        score_I = self._anchor_scores(near_JJ)[mine]

        # Arranging module (Eq. 9): the learned similarity of every ordered pair.
        m_IJ = arrange(self.arranger(z_ID, z_JD), settings.activation)

        if settings.normalise:
            z_ID, z_JD = functional.normalize(z_ID, dim=1), functional.normalize(z_JD, dim=1)
        distance_IJ = pair_distances(z_ID, z_JD)
        am = arranging_loss(
            m_IJ / m_IJ.amax(dim=1, keepdim=True) if settings.m_scale == "row_max" else m_IJ,
            distance_IJ.square() if settings.distance == "squared" else distance_IJ,
            score_I,
            alpha=settings.alpha,
            tau=settings.tau,
            join=gather_with_gradient,
        )
        self._watched = {"dsa_score": score_I.mean(), "dsa_m_max": m_IJ.detach().amax(dim=1).mean()}
        # L_con is a sum over all anchors, but the loop takes the mean over ranks: hence the factor.
        return {"dsa_am": am, "dsa_con": constraint_loss(m_IJ, prior_IJ) * world_size()}

    def _anchor_scores(self, distance_JJ: Tensor) -> Tensor:
        """sc, the quality of every view as an anchor (Eq. 14, 15), or ones."""
        if self.settings.anchors == "alike":
            return distance_JJ.new_ones(len(distance_JJ))
        neighbors_JE = neighbourhood(distance_JJ, self.settings.eta)
        return connection_scores(neighbors_JE, latent=self.settings.anchors == "latent", dtype=distance_JJ.dtype)

    # -- everything else is the host's ---------------------------------------------------------------------------

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

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> DSA:
        """Also moves the auxiliary encoder to the device. It is no submodule, so that it is in no checkpoint."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.auxiliary is not None:
            self.auxiliary.encoder._apply(fn)  # type: ignore[no-untyped-call]
        return self


class Arranger(nn.Module):
    """f_s of Eq. 9: a network of two layers on concatenated pairs, computed without concatenating them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * width, hidden)
        self.output = nn.Linear(hidden, 1)

    def forward(self, z_ID: Tensor, z_JD: Tensor) -> Tensor:
        """The raw score of every ordered pair, (I, J)."""
        for_first_HD, for_second_HD = self.hidden.weight.chunk(2, dim=1)
        first_IH = functional.linear(z_ID, for_first_HD, self.hidden.bias)
        second_JH = functional.linear(z_JD, for_second_HD)
        return pair_scores(first_IH, second_JH, self.output.weight[0]) + self.output.bias


class StudentViews:
    """Records the student's forward passes while the host computes its terms.

    Used as a context manager; outside of it nothing is recorded.
    """

    def __init__(self, student: nn.Module, names: Sequence[str]) -> None:
        self.student = student
        self.names = names  # of the views that show the image itself, not a neighbour
        self.heard: list[tuple[Tensor, Tensor]] = []  # pixels and representations of each forward pass
        self.listening = False
        student.register_forward_hook(self._hear)

    def __enter__(self) -> None:
        self.heard, self.listening = [], True

    def __exit__(self, *error: object) -> None:
        self.heard, self.listening = [], False

    def _hear(self, module: nn.Module, given: tuple[Any, ...], features: Any) -> None:
        if self.listening:
            self.heard.append((given[0], features.vector))

    def two(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The first two views of every image that have the size of the first recorded view.

        If the student saw only one such view, the first other view of that size goes through the student here. This
        is the case for ReSSL (its weak view) and FLSL (its teacher crop).

        Returns:
            Representations z (2B, D) and their pixels (2B, 3, S, S).

        Raises:
            ValueError: if the host never ran the student, or its views include no second one of that size.
        """
        if not self.heard:
            raise ValueError("dsa heard no forward pass of the encoder while its host computed its terms")
        count, size = 2 * len(batch), self.heard[0][0].shape[-1]
        same = [(images, z) for images, z in self.heard if images.shape[-1] == size]
        images, z = torch.cat([part for part, _ in same])[:count], torch.cat([part for _, part in same])[:count]
        if len(z) == count:
            return z, images
        for view_B3SS in (view for name in self.names for view in batch.views[name]):
            if view_B3SS.shape == images.shape and not torch.equal(view_B3SS, images):
                return torch.cat([z, self.student(view_B3SS).vector]), torch.cat([images, view_B3SS])
        raise ValueError(
            f"dsa compares two views of an image, and its host makes one of {size} pixels: give it a second one "
            "(method.host.global_crops.count: 2)"
        )


class FrozenViews:
    """The frozen auxiliary encoder, which takes views that were normalised for the student."""

    def __init__(self, encoder: Encoder, mean: Sequence[float], std: Sequence[float]) -> None:
        self.encoder = encoder.eval().requires_grad_(False)
        self.mean, self.std = mean, std

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(I, Da) unit vectors; the views are first brought to the auxiliary encoder's image size and normalisation."""

        def column(values: Sequence[float]) -> Tensor:
            return images.new_tensor(values)[:, None, None]

        pixels = images * column(self.std) + column(self.mean)
        side = self.encoder.image_size
        if pixels.shape[-1] != side:
            pixels = functional.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
        vectors = self.encoder((pixels - column(self.encoder.mean)) / column(self.encoder.std)).vector
        return functional.normalize(at_least_float32(vectors), dim=1)
