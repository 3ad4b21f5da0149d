"""SwAV: the other crops predict to which prototypes a large crop is assigned.

Source: docs/methods.md#swav.

Shape legend: V crops of one size (G large ones), B images of this rank, S side of a crop, X rows of all crops and
images, D width of an embedding, K prototypes, Q rows of a queue.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as functional
from lightly.loss import SwaVLoss
from torch import Tensor, nn

from stages.models.encoder import Encoder
from stages.models.heads import at_least_float32
from stages.models.mlp import mlp
from stages.pretrain.data.batch import Batch
from stages.pretrain.methods.hosts.queue import Queue
from stages.pretrain.methods.hosts.settings.swav import SwAVSettings
from stages.pretrain.methods.method import Method, Step
from stages.pretrain.methods.shared.assignments import usage
from stages.pretrain.methods.shared.colours import crop_colours
from stages.pretrain.views.plan import ViewPlan, ViewSpec
from stages.training.collectives import rank, world_size


class SwAV(Method):
    """Crops of two sizes, a projector, prototypes, and a queue for each large crop. Term: swav."""

    def __init__(self, settings: SwAVSettings, encoder: Encoder, *, global_batch: int) -> None:
        super().__init__()
        self.settings = settings
        self.student = encoder
        self.projector = mlp(settings.projector.widths(encoder.vector_width))
        self.prototypes = nn.Linear(settings.projector.out, settings.prototypes, bias=False)
        counts = settings.global_crops.count if settings.queue else 0
        self.queues = nn.ModuleList(Queue(settings.queue, settings.projector.out) for _ in range(counts))
        self.global_batch = global_batch
        self.use_queue = False
        self._embeddings: list[Tensor] = []  # of the large crops, (G, B, D), of each forward pass of this step
        self._watched: dict[str, Tensor] = {}
        self.loss = SwaVLoss(
            temperature=settings.temperature,
            sinkhorn_iterations=settings.iterations,
            sinkhorn_epsilon=settings.epsilon,
            sinkhorn_gather_distributed=True,
        )

    @classmethod
    def build(
        cls, settings: SwAVSettings, encoder: Encoder, *, total_steps: int, steps_per_epoch: int, global_batch: int
    ) -> Self:
        """The method; when its queue is full follows from the global batch.

        Args:
            settings: SwAV's settings.
            encoder: the student.
            total_steps: not used.
            steps_per_epoch: not used.
            global_batch: images of one optimiser step, of all ranks together.
        """
        return cls(settings, encoder, global_batch=global_batch)

    def view_plan(self) -> ViewPlan:
        """Large and small crops, all with the same colour operations."""
        colour = crop_colours((0.8, 0.8, 0.8, 0.2), blur_p=0.5)
        crops = {"global": self.settings.global_crops, "local": self.settings.local_crops}
        return ViewPlan(
            tuple(
                ViewSpec(name, crop.size, crop.count, crop.scale, flip_p=self.settings.flip, photometric=colour)
                for name, crop in crops.items()
                if crop.count
            )
        )

    @torch.no_grad()
    def start_step(self, step: Step) -> None:
        """Brings the prototypes back to length 1, and uses the queue from when it is full."""
        self.prototypes.weight.copy_(functional.normalize(self.prototypes.weight, dim=1))
        pushed = (step.index - self.settings.queue_from_epoch * step.steps_per_epoch) * self.global_batch
        self.use_queue = bool(self.queues) and pushed >= self.settings.queue
        self._embeddings = []

    def compute_terms(self, batch: Batch) -> dict[str, Tensor]:
        """The SwAV loss of all crops, whose assignments are balanced over all ranks and the queues."""
        crops = [batch.views[name] for name in ("global", "local") if name in batch.views]
        # One forward pass of the encoder for each size of crop, one of the projector for all crops.
        vectors = [self.student(views_VB3SS.flatten(0, 1)).vector for views_VB3SS in crops]
        embeddings_XD = functional.normalize(at_least_float32(self.projector(torch.cat(vectors))), dim=1)
        large = len(batch.views["global"])
        self._embeddings.append(embeddings_XD[: large * len(batch)].detach().reshape(large, len(batch), -1))
        with torch.autocast(embeddings_XD.device.type, enabled=False):
            scores = list(self.prototypes(embeddings_XD).split(len(batch)))  # of each crop, (B, K)
            queued = [self.prototypes(rows_QD) for rows_QD in self._queue_share()] if self.use_queue else None
            loss: Tensor = self.loss(scores[:large], scores[large:], queued)
            predicted_XK = torch.cat(scores[:large]).detach().div(self.settings.temperature).softmax(dim=1)
            self._watched = {"prototype_usage": usage(predicted_XK)}
        return {"swav": loss.squeeze()}

    def _queue_share(self) -> list[Tensor]:
        """This rank's share of every crop's queue. Sinkhorn over all ranks then counts each entry once."""
        return [queue.rows[rank() :: world_size()] for queue in self.queues if isinstance(queue, Queue)]

    def before_update(self, step: Step) -> None:
        """Drops the gradients of the prototypes in the first steps (`freeze_prototypes`)."""
        if step.index < self.settings.freeze_prototypes:
            self.prototypes.weight.grad = None

    def after_step(self, step: Step) -> None:
        """Pushes this step's embeddings of the large crops into their queues, from epoch `queue_from_epoch`."""
        if self.queues and step.epoch >= self.settings.queue_from_epoch:
            for embeddings_GBD in self._embeddings:
                for queue, embeddings_BD in zip(self.queues, embeddings_GBD, strict=True):
                    assert isinstance(queue, Queue)
                    queue.push(embeddings_BD)
        self._embeddings = []

    def encoder(self) -> Encoder:
        """The student, the only network."""
        return self.student

    def diagnostics(self) -> dict[str, float]:
        """The share of prototypes in use."""
        return {name: value.item() for name, value in self._watched.items()}
