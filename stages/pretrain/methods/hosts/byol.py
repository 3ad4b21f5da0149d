"""BYOL: predicts the moving average's projection of the other view, without negatives.

Source: docs/methods.md#byol.
"""

from __future__ import annotations

from lightly.loss import NegativeCosineSimilarity
from torch import Tensor

from stages.models.encoder import Encoder
from stages.models.mlp import mlp
from stages.pretrain.data.batch import Batch
from stages.pretrain.methods.hosts.settings.byol import BYOLSettings
from stages.pretrain.methods.hosts.two_view import TwoView, exactly


class BYOL(TwoView):
    """Two views, projector, predictor and a moving average. Term: byol, the sum of both directions."""

    def __init__(self, settings: BYOLSettings, encoder: Encoder) -> None:
        projector = mlp(settings.projector.widths(encoder.vector_width))
        predictor = mlp([settings.projector.out, settings.predictor_hidden, settings.projector.out])
        super().__init__(
            settings, encoder, projector, predictor=predictor, teacher=settings.teacher, export=settings.export
        )

    def compute_terms(self, batch: Batch) -> dict[str, Tensor]:
        """The student's prediction from each view against the moving average's projection of the other."""
        first, second = self.predict(batch)
        target_first, target_second = self.targets(batch)
        return {"byol": exactly(byol_loss, first, target_second) + exactly(byol_loss, second, target_first)}


def byol_loss(predicted_BD: Tensor, target_BD: Tensor) -> Tensor:
    """One direction of BYOL's loss: the mean over images of 2 - 2 cos. The target gets no gradient."""
    loss: Tensor = 2 + 2 * NegativeCosineSimilarity()(predicted_BD, target_BD.detach())
    return loss
