"""DSA as its authors released it (`variant: released`), which is another objective than the paper's (method.py).

Source: docs/methods.md#dsa-as-released.

The host makes forward passes of its network. This records the projections of two views of every image from them, and
adds two terms to the host's own.

Shape legend: I images of this rank, N images of all ranks, D width of a projection, Da width of an auxiliary feature.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from stages.models.encoder import Encoder
from stages.pretrain.data.batch import Batch
from stages.pretrain.methods.dsa.losses.dsa_arranging import pair_distances, pair_scores
from stages.pretrain.methods.dsa.losses.dsa_released import (
    NO_SIZE,
    column_sizes,
    released_arranging_loss,
    released_constraint_loss,
    released_prior,
    rows_to_one,
    second_order_scores,
)
from stages.pretrain.methods.dsa.losses.dsa_scoring import neighbourhood
from stages.pretrain.methods.dsa.method import Arranger
from stages.pretrain.methods.dsa.regulariser import Regulariser
from stages.pretrain.methods.dsa.settings import DSASettings
from stages.pretrain.methods.dsa.views import StudentViews
from stages.pretrain.methods.method import Method
from stages.pretrain.views.plan import ViewPlan, ViewSpec
from stages.training.collectives import gather, gather_with_gradient, rank

ORIGINAL = "original"  # the view of the whole image, neither cropped nor coloured


class ReleasedDSA(Regulariser):
    """A host of two views and two more terms: dsa_released_arrange and dsa_released_constraint."""

    def __init__(self, settings: DSASettings, host: Method, encoder: Encoder, auxiliary: Encoder | None) -> None:
        super().__init__(settings, host, encoder, auxiliary)
        projection = host.projection()
        assert projection is not None  # the settings see to it
        network, width = projection
        self.arranger = Differences(width) if settings.released.pairs == "difference" else Concatenations(width)
        self.views = StudentViews(network, self.image_views(), lambda projected_BD: projected_BD)

    def view_plan(self) -> ViewPlan:
        """The host's views; beside them the whole image for the auxiliary encoder, or the table of embeddings."""
        plan = super().view_plan()
        if self.auxiliary is None:
            return plan
        whole = ViewSpec(ORIGINAL, self.auxiliary.encoder.image_size, whole=True)
        return replace(plan, views=(*plan.views, whole))

    def regularise(self, z_ID: Tensor, images: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Both terms, from the projections and the auxiliary features of two views and of the whole images."""
        released = self.settings.released
        first_ID, second_ID = z_ID.chunk(2)
        first_ND, second_ND = gather_with_gradient(first_ID), gather_with_gradient(second_ID)
        mine = slice(rank() * len(first_ID), (rank() + 1) * len(first_ID))  # this rank's anchors among all images

        score_I, priors = self._auxiliary_says(images, batch, mine, z_ID.dtype)
        # The blocks 01 and 10 are computed from one view each: an oversight of the release, kept here.
        m_00, m_11 = self.arranger(first_ID, first_ND), self.arranger(second_ID, second_ND)
        m = [m_00, m_11, m_00, m_11]

        units = [functional.normalize(z, dim=1) for z in (first_ID, second_ID, first_ND, second_ND)]
        own_IN = torch.zeros_like(m_00, dtype=torch.bool)
        own_IN[:, mine].fill_diagonal_(True)
        arranging = released_arranging_loss(
            m, blocks(*units), score_I, own_IN, temperature=released.temperature, join=gather_with_gradient
        )
        constraint = released_constraint_loss(m, priors, join=gather_with_gradient)
        self._watched = {"dsa_score": score_I.mean(), "dsa_m_max": m_00.detach().amax(dim=1).mean()}
        return {"dsa_released_arrange": arranging, "dsa_released_constraint": constraint}

    @torch.no_grad()
    def _auxiliary_says(
        self, images: Tensor, batch: Batch, mine: slice, dtype: torch.dtype
    ) -> tuple[Tensor, list[Tensor]]:
        """The scores s of this rank's images, from the whole images, and each block's prior, from the views."""
        if self.auxiliary is None:
            whole_IA = functional.normalize(batch.extras["embedding"], dim=1)
            views = [whole_IA, whole_IA]
        else:
            whole_IA, views = self.auxiliary(batch.views[ORIGINAL][0]), list(self.auxiliary(images).chunk(2))
        whole_NA = gather(whole_IA).to(dtype)
        neighbors_NE = neighbourhood(pair_distances(whole_NA, whole_NA), self.settings.eta)
        score_N = second_order_scores(neighbors_NE, more_than=self.settings.released.mu, dtype=dtype)
        everyone = [gather(view_IA).to(dtype) for view_IA in views]
        distances = blocks(*(view_NA[mine] for view_NA in everyone), *everyone)
        return score_N[mine], [released_prior(d_IN, tau=self.settings.released.tau_prior) for d_IN in distances]


def blocks(first_ID: Tensor, second_ID: Tensor, first_ND: Tensor, second_ND: Tensor) -> list[Tensor]:
    """Distances (I, N) of this rank's images to all, in the blocks 00, 11, 01 and 10 of first and second views."""
    return [
        pair_distances(first_ID, first_ND),
        pair_distances(second_ID, second_ND),
        pair_distances(first_ID, second_ND),
        pair_distances(second_ID, first_ND),
    ]


class Differences(nn.Module):
    """The network that the release trains: it reads z_i - z_j, brought to sum 1 over all pairs in every column."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.output = nn.Linear(width, 1)
        start_above_zero(self.hidden, self.output)

    def forward(self, z_ID: Tensor, z_ND: Tensor) -> Tensor:
        """M of some anchors and all images, (I, N); rows sum to 1."""
        sizes_D = column_sizes(z_ND).clamp_min(NO_SIZE)
        first_IH = functional.linear(z_ID / sizes_D, self.hidden.weight, self.hidden.bias)
        second_NH = functional.linear(z_ND / sizes_D, self.hidden.weight)
        return rows_to_one((pair_scores(first_IH, -second_NH, self.output.weight[0]) + self.output.bias).relu())


class Concatenations(Arranger):
    """The release's other network, which it holds but does not train: concat(z_i, z_j), no normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        start_above_zero(self.hidden, self.output)

    def forward(self, z_ID: Tensor, z_ND: Tensor) -> Tensor:
        """M of some anchors and all images, (I, N), at least 0."""
        return super().forward(z_ID, z_ND).relu()


@torch.no_grad()
def start_above_zero(hidden: nn.Linear, output: nn.Linear) -> None:
    """Turns the sign of a new network's last layer where its score of an input of zeros is below 0.

    The scores end in a ReLU, and the inputs of `Differences` are nearly 0: a network that starts below 0 is 0 for all
    pairs and gets no gradient, ever. The release leaves that to chance.
    """
    if output(hidden.bias.relu()) < 0:
        output.weight.neg_()
        output.bias.neg_()
