"""VICReg: the views agree (invariance), every dimension varies (variance), dimensions are uncorrelated (covariance).

Source: docs/methods.md#vicreg.
"""

from __future__ import annotations

from lightly.loss import VICRegLoss
from torch import Tensor

from stages.models.encoder import Encoder
from stages.models.mlp import mlp
from stages.pretrain.data.batch import Batch
from stages.pretrain.methods.hosts.settings.vicreg import VICRegSettings
from stages.pretrain.methods.hosts.two_view import TwoView, exactly


class VICReg(TwoView):
    """Two views and a projector. Term: vicreg; variances and covariances are over the rows of all ranks."""

    def __init__(self, settings: VICRegSettings, encoder: Encoder) -> None:
        super().__init__(settings, encoder, mlp(settings.projector.widths(encoder.vector_width)))
        self.loss = VICRegLoss(settings.invariance, settings.variance, settings.covariance, gather_distributed=True)

    def compute_terms(self, batch: Batch) -> dict[str, Tensor]:
        """The VICReg loss of the two projections, with its three weights."""
        return {"vicreg": exactly(self.loss, *self.project(batch))}
