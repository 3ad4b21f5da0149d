"""SimCLR: finds the other view of the same image among all views of the batch.

Source: docs/methods.md#simclr.
"""

from __future__ import annotations

from lightly.loss import NTXentLoss
from torch import Tensor

from stages.models.encoder import Encoder
from stages.models.mlp import mlp
from stages.pretrain.data.batch import Batch
from stages.pretrain.methods.hosts.settings.simclr import SimCLRSettings
from stages.pretrain.methods.hosts.two_view import TwoView, exactly
from stages.pretrain.methods.shared.colours import crop_colours
from stages.pretrain.views.plan import Photometric


class SimCLR(TwoView):
    """Two views and a projector. Term: simclr; negatives are the views of all ranks."""

    def __init__(self, settings: SimCLRSettings, encoder: Encoder) -> None:
        super().__init__(settings, encoder, mlp(settings.projector.widths(encoder.vector_width), end="norm"))
        self.loss = NTXentLoss(temperature=settings.temperature, gather_distributed=True)

    def colours(self) -> tuple[Photometric, Photometric]:
        """The same for both views, with a strong jitter and no solarisation."""
        colour = crop_colours((0.8, 0.8, 0.8, 0.2), blur_p=0.5)
        return colour, colour

    def project(self, batch: Batch) -> list[Tensor]:
        """Both views in one forward pass, as in the paper, so that batch norms see them together."""
        return list(self.network(batch.views["global"].flatten(0, 1)).chunk(2))

    def compute_terms(self, batch: Batch) -> dict[str, Tensor]:
        """The NT-Xent loss of the two views, with the views of all ranks as negatives."""
        return {"simclr": exactly(self.loss, *self.project(batch))}
