"""MoCo v2 and v3: finds the key of the other view, made by a moving average, among the keys of other images.

Source: docs/methods.md#moco.

The official MoCo v2 shuffles images between GPUs, because its batch norms see one GPU's images only. Batch norms here
use the statistics of all ranks (launch/assemble.py), so there is no shuffling.
"""

from __future__ import annotations

from functools import partial

import torch
from lightly.loss import NTXentLoss
from torch import Tensor

from stages.models.encoder import Encoder
from stages.models.mlp import mlp
from stages.pretrain.config.parts import TeacherSettings
from stages.pretrain.data.batch import Batch
from stages.pretrain.methods.hosts.losses.moco import in_batch_contrast
from stages.pretrain.methods.hosts.queue import Queue
from stages.pretrain.methods.hosts.settings.moco import MoCoSettings
from stages.pretrain.methods.hosts.settings.two_view import MLPSettings
from stages.pretrain.methods.hosts.two_view import TwoView, exactly
from stages.pretrain.methods.method import Step
from stages.pretrain.methods.shared.colours import crop_colours
from stages.pretrain.views.plan import Photometric
from stages.training.collectives import gather


class MoCoV2(TwoView):
    """View 1 gives the query, view 2 its key, and the queue the other keys. Term: moco."""

    def __init__(self, settings: MoCoSettings, encoder: Encoder) -> None:
        head = settings.projector or MLPSettings(hidden=2048, out=128)
        teacher = settings.teacher or TeacherSettings(momentum=0.999, momentum_end=0.999)
        projector = mlp(head.widths(encoder.vector_width), norm=False)
        super().__init__(settings, encoder, projector, teacher=teacher, export=settings.export)
        self.queue = Queue(settings.queue, head.out)
        self.loss = queue_contrast(self.queue, settings.temperature or 0.2)
        self._keys: list[Tensor] = []  # of each forward pass of this step

    def colours(self) -> tuple[Photometric, Photometric]:
        """The same for both views, without solarisation."""
        colour = crop_colours((0.4, 0.4, 0.4, 0.1), blur_p=0.5)
        return colour, colour

    def start_step(self, step: Step) -> None:
        """Starts a step with no new keys for the queue."""
        self._keys = []

    def compute_terms(self, batch: Batch) -> dict[str, Tensor]:
        """Queries of view 1 against their keys and the queue."""
        assert self.teacher is not None
        query_view, key_view = batch.views["global"]
        query_BD = self.network(query_view)
        with torch.no_grad():
            key_BD = self.teacher(key_view)
        self._keys.append(key_BD)
        return {"moco": exactly(self.loss, query_BD, key_BD)}

    def after_step(self, step: Step) -> None:
        """Moves the moving average, then pushes the keys of this step into the queue."""
        super().after_step(step)
        for keys_BD in self._keys:  # only now, because the loss compares with earlier batches only
            self.queue.push(keys_BD)
        self._keys = []


class MoCoV3(TwoView):
    """Both views give queries and keys. Term: moco, the sum of both directions; other keys are those of all ranks."""

    def __init__(self, settings: MoCoSettings, encoder: Encoder) -> None:
        head = settings.projector or MLPSettings(hidden=4096, out=256, layers=3 if encoder.is_vit else 2)
        projector = mlp(head.widths(encoder.vector_width), end="fixed_norm")
        predictor = mlp(
            [head.out, settings.predictor_hidden, head.out], end="fixed_norm" if encoder.is_vit else "plain"
        )
        teacher = settings.teacher or TeacherSettings(momentum=0.99)
        super().__init__(settings, encoder, projector, predictor=predictor, teacher=teacher, export=settings.export)
        self.temperature = settings.temperature or (0.2 if encoder.is_vit else 1.0)

    def compute_terms(self, batch: Batch) -> dict[str, Tensor]:
        """Predictions from each view against the keys of the other view, of all ranks."""
        first, second = self.predict(batch)
        key_first, key_second = (gather(key_BD) for key_BD in self.targets(batch))
        loss = partial(in_batch_contrast, first=batch.offset, temperature=self.temperature)
        return {"moco": exactly(loss, first, key_second) + exactly(loss, second, key_first)}


def queue_contrast(queue: Queue, temperature: float) -> NTXentLoss:
    """MoCo v2's loss of queries and keys: lightly's NT-Xent with the entries of this queue as negatives."""
    loss = NTXentLoss(temperature=temperature)
    loss.memory_bank = queue
    return loss
