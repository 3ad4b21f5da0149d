"""Barlow Twins: brings the cross-correlation of two views' projections close to the identity.

Source: docs/methods.md#barlow-twins.
"""

from __future__ import annotations

from lightly.loss import BarlowTwinsLoss
from torch import Tensor

from stages.models.encoder import Encoder
from stages.models.mlp import mlp
from stages.pretrain.data.batch import Batch
from stages.pretrain.methods.hosts.settings.barlow_twins import BarlowTwinsSettings
from stages.pretrain.methods.hosts.two_view import TwoView, exactly
from stages.training.collectives import gather_with_gradient


class BarlowTwins(TwoView):
    """Two views and a projector. Term: barlow_twins."""

    def __init__(self, settings: BarlowTwinsSettings, encoder: Encoder) -> None:
        super().__init__(settings, encoder, mlp(settings.projector.widths(encoder.vector_width)))
        # It gets the rows of all ranks. lightly's own gathering would standardise the rows of each rank separately.
        self.loss = BarlowTwinsLoss(lambda_param=settings.off_diagonal)

    def compute_terms(self, batch: Batch) -> dict[str, Tensor]:
        """The cross-correlation of the projections of all ranks against the identity."""
        first, second = (gather_with_gradient(projected_BD) for projected_BD in self.project(batch))
        return {"barlow_twins": exactly(self.loss, first, second)}
