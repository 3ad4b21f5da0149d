"""DSA as its paper writes it: a regulariser around any other method, its host. The equation numbers are the paper's.

Source: docs/methods.md#dsa. The authors' release computes other terms: released.py.

The host makes forward passes of the student. DSA records the representations of two views of every image from them, and
adds two terms to the host's own.

Shape legend: B images of this rank, I its 2B views, J the 2N views of all ranks, D width of a
representation, Da width of an auxiliary feature, E neighbours, H hidden units.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from stages.models.encoder import Encoder
from stages.pretrain.data.batch import Batch
from stages.pretrain.methods.dsa.losses.dsa_arranging import (
    arrange,
    arranging_loss,
    constraint_loss,
    pair_distances,
    pair_scores,
)
from stages.pretrain.methods.dsa.losses.dsa_scoring import connection_scores, neighbourhood, prior_similarity
from stages.pretrain.methods.dsa.regulariser import Regulariser
from stages.pretrain.methods.dsa.settings import DSASettings
from stages.pretrain.methods.dsa.views import StudentViews
from stages.pretrain.methods.method import Method
from stages.training.collectives import gather, gather_with_gradient, rank, world_size


class DSA(Regulariser):
    """A host and two more terms: dsa_am (L_AM^s, Eq. 16) and dsa_con (L_con, Eq. 13)."""

    def __init__(self, settings: DSASettings, host: Method, encoder: Encoder, auxiliary: Encoder | None) -> None:
        super().__init__(settings, host, encoder, auxiliary)
        width = encoder.vector_width  # the host may have widened it, as CoTAP's filter does
        self.arranger = Arranger(width, settings.hidden or width)
        student = host.representation() or encoder
        self.views = StudentViews(student, self.image_views(), lambda features: features.vector)

    def regularise(self, z_ID: Tensor, images: Tensor, batch: Batch) -> dict[str, Tensor]:
        """L_AM^s and L_con from the representations and the auxiliary features of the same views."""
        settings = self.settings
        auxiliary_ID = self._auxiliary_features(batch, images)
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

    def _auxiliary_features(self, batch: Batch, images: Tensor) -> Tensor:
        """z~ of the same views, (I, Da), of length 1. From a table, both views of an image get the whole image's."""
        if self.auxiliary is not None:
            return self.auxiliary(images)
        embedding_BD = batch.extras["embedding"]
        return functional.normalize(torch.cat([embedding_BD, embedding_BD]), dim=1)

    def _anchor_scores(self, distance_JJ: Tensor) -> Tensor:
        """sc, the quality of every view as an anchor (Eq. 14, 15), or ones."""
        if self.settings.anchors == "alike":
            return distance_JJ.new_ones(len(distance_JJ))
        neighbors_JE = neighbourhood(distance_JJ, self.settings.eta)
        return connection_scores(neighbors_JE, latent=self.settings.anchors == "latent", dtype=distance_JJ.dtype)


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
