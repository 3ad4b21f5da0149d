"""DSA's scoring module: a frozen auxiliary encoder gives pairs a prior similarity and anchors a score. No gradient.

Source: docs/methods.md#dsa-scoring-module.

Shape legend: J all 2N views of the batch, I some of them (the anchors), E neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def prior_similarity(distance_IJ: Tensor, *, tau: float = 1.0) -> Tensor:
    """M_pre of Eq. 11 and 12: exp(-d^2 / tau) of auxiliary distances d, each row divided by its sum.

    The printed Eq. 11 has no minus sign. Closer views must weigh more, so there is one here.
    """
    return torch.softmax(-distance_IJ.square() / tau, dim=1)


@torch.no_grad()
def neighbourhood(distance_JJ: Tensor, eta: int) -> Tensor:
    """The indices of the nearest other views of each view, nearest first: (J, E) with E = min(eta, J - 1)."""
    others_JJ = distance_JJ.clone().fill_diagonal_(torch.inf)
    return others_JJ.topk(min(eta, len(distance_JJ) - 1), dim=1, largest=False).indices


@torch.no_grad()
def connection_scores(neighbors_JE: Tensor, *, latent: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    """The score sc of Eq. 14 and 15: the share of an anchor's neighbours that have it among their own: (J,) in [0, 1].

    Args:
        neighbors_JE: `neighbourhood` of the auxiliary features.
        latent: also count a neighbour that has a mutual neighbour of the anchor among its own: the paper's "latent
            connections". The second condition of Eq. 14 is not legible.
        dtype: of the result.
    """
    count, eta = neighbors_JE.shape
    near_JJ = torch.zeros(count, count, dtype=dtype, device=neighbors_JE.device).scatter_(1, neighbors_JE, 1)
    connected_JJ = mutual_JJ = near_JJ * near_JJ.T
    if latent:
        connected_JJ = near_JJ * ((near_JJ.T + mutual_JJ @ near_JJ.T) > 0)
    return connected_JJ.sum(dim=1) / eta
