"""VICReg: views agree, every dimension varies, no two dimensions say the same (docs/methods.md#vicreg)."""

from __future__ import annotations

from lightly.loss import VICRegLoss
from torch import Tensor

from stages.models.encoder import Encoder
from stages.models.mlp import mlp
from stages.pretrain.data.batch import Batch
from stages.pretrain.methods.hosts.settings.vicreg import VICRegSettings
from stages.pretrain.methods.hosts.two_view import TwoView, exactly


class VICReg(TwoView):
    """Term: vicreg. Variances and covariances are those of all ranks' rows."""

    def __init__(self, settings: VICRegSettings, encoder: Encoder) -> None:
        super().__init__(settings, encoder, mlp(settings.projector.widths(encoder.vector_width)))
        self.loss = VICRegLoss(settings.invariance, settings.variance, settings.covariance, gather_distributed=True)

    def compute_terms(self, batch: Batch) -> dict[str, Tensor]:
        return {"vicreg": exactly(self.loss, *self.project(batch))}
