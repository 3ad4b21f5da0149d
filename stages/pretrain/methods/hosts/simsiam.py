"""SimSiam: predicts the other view's projection, which gets no gradient; there is no moving average.

Source: docs/methods.md#simsiam.
"""

from __future__ import annotations

from lightly.loss import NegativeCosineSimilarity
from torch import Tensor

from stages.models.encoder import Encoder
from stages.models.mlp import mlp
from stages.pretrain.data.batch import Batch
from stages.pretrain.methods.hosts.settings.simsiam import SimSiamSettings
from stages.pretrain.methods.hosts.two_view import TwoView, exactly
from stages.pretrain.methods.shared.colours import crop_colours
from stages.pretrain.views.plan import Photometric


class SimSiam(TwoView):
    """Two views, projector and predictor. Term: simsiam, the mean of both directions."""

    def __init__(self, settings: SimSiamSettings, encoder: Encoder) -> None:
        out = settings.projector.out
        projector = mlp(settings.projector.widths(encoder.vector_width), end="fixed_norm")
        super().__init__(settings, encoder, projector, predictor=mlp([out, settings.predictor_hidden, out]))
        self.loss = NegativeCosineSimilarity()

    def colours(self) -> tuple[Photometric, Photometric]:
        """The same for both views, without solarisation."""
        colour = crop_colours((0.4, 0.4, 0.4, 0.1), blur_p=0.5)
        return colour, colour

    def compute_terms(self, batch: Batch) -> dict[str, Tensor]:
        """The prediction from each view against the projection of the other: minus the cosine."""
        assert self.predictor is not None
        z1, z2 = self.project(batch)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        losses = exactly(self.loss, p1, z2.detach()), exactly(self.loss, p2, z1.detach())
        return {"simsiam": 0.5 * (losses[0] + losses[1])}
