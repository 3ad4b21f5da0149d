"""ReSSL: an image is as similar to earlier images whether it is strongly or weakly augmented.

Source: docs/methods.md#ressl.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from stages.models.encoder import Encoder
from stages.models.mlp import mlp
from stages.pretrain.data.batch import Batch
from stages.pretrain.methods.hosts.losses.ressl import ressl_loss
from stages.pretrain.methods.hosts.queue import Queue
from stages.pretrain.methods.hosts.settings.ressl import ReSSLSettings
from stages.pretrain.methods.hosts.two_view import TwoView, exactly
from stages.pretrain.methods.method import Step
from stages.pretrain.methods.shared.colours import crop_colours
from stages.pretrain.views.plan import Photometric


class ReSSL(TwoView):
    """The student sees a strong view, the teacher a weak one. Term: ressl."""

    def __init__(self, settings: ReSSLSettings, encoder: Encoder) -> None:
        projector = mlp(settings.projector.widths(encoder.vector_width))
        super().__init__(settings, encoder, projector, teacher=settings.teacher, export=settings.export)
        self.queue = Queue(settings.queue, settings.projector.out)
        self.loss = partial(ressl_loss, tau_s=settings.tau_student, tau_t=settings.tau_teacher)
        self._keys: list[Tensor] = []  # the teacher's projections, of each forward pass of this step

    def colours(self) -> tuple[Photometric, Photometric]:
        """Strong colours for the student's view, none for the teacher's."""
        return crop_colours((0.4, 0.4, 0.4, 0.1), blur_p=0.5), Photometric()

    def start_step(self, step: Step) -> None:
        """Starts a step with no new projections for the queue."""
        self._keys = []

    def compute_terms(self, batch: Batch) -> dict[str, Tensor]:
        """The student's similarities to the queue against the teacher's."""
        assert self.teacher is not None
        strong, weak = batch.views["global"]
        with torch.no_grad():
            teacher_BD = self.teacher(weak)
        self._keys.append(teacher_BD)
        return {"ressl": exactly(self.loss, self.network(strong), teacher_BD, self.queue.rows)}

    def after_step(self, step: Step) -> None:
        """Moves the teacher, then pushes its projections of this step into the queue."""
        super().after_step(step)
        for keys_BD in self._keys:
            self.queue.push(keys_BD)
        self._keys = []
