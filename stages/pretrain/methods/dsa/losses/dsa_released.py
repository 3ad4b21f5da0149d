"""The terms of DSA as its authors released it, which differ from the paper's in every part.

Source: docs/methods.md#dsa-as-released.

Pairs are compared in four blocks: 00 and 11, images within one view, and 01 and 10, images across the two. Every
function takes some anchors against all images, so that each rank computes its own anchors only.

Shape legend: I images of this rank (the anchors), N images of all ranks, D width of a projection, E neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor

Join = Callable[[Tensor], Tensor]  # concatenates one row from every rank, with gradient
NO_SIZE = 1e-12  # least divisor of a normalisation


@torch.no_grad()
def second_order_scores(neighbors_NE: Tensor, *, more_than: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """s, the quality of each image as an anchor: (N,) in [0, 1].

    The share of an image's neighbours p that are tied to it: more than `more_than` of p's own neighbours have the image
    among theirs.
    """
    count, eta = neighbors_NE.shape
    near_NN = torch.zeros(count, count, dtype=dtype, device=neighbors_NE.device).scatter_(1, neighbors_NE, 1)
    ways_NN = (near_NN @ near_NN).T  # row i, column p: from p to i in two steps
    return (near_NN * (ways_NN > more_than)).sum(dim=1) / eta


@torch.no_grad()
def released_prior(distance_IN: Tensor, *, tau: float) -> Tensor:
    """exp(-d / tau) of auxiliary distances d: neither squared nor divided by a row's sum, as the paper's prior is."""
    return torch.exp(-distance_IN / tau)


def column_sizes(z_ND: Tensor) -> Tensor:
    """For each column of z, the sum of |z_i - z_j| over all ordered pairs: (D,).

    In the order of a column's values, the k-th of N is above k and below N - 1 - k others: no pair is ever made.
    """
    count = len(z_ND)
    sorted_ND = (z_ND - z_ND.mean(dim=0).detach()).sort(dim=0).values
    rank_N = torch.arange(count, device=z_ND.device, dtype=z_ND.dtype)
    return 2 * (2 * rank_N - count + 1) @ sorted_ND


def rows_to_one(scores_IN: Tensor) -> Tensor:
    """Scores of at least 0, each row divided by its sum; a row of zeros stays one."""
    return scores_IN / scores_IN.sum(dim=1, keepdim=True).clamp_min(NO_SIZE)


def released_arranging_loss(
    m: Sequence[Tensor],
    distances: Sequence[Tensor],
    score_I: Tensor,
    own_IN: Tensor,
    *,
    temperature: float,
    join: Join | None = None,
) -> Tensor:
    """log(1 + the mean over blocks and pairs of exp(s_i D_ij (2 M_ij - 1) / temperature)), a scalar.

    Args:
        m: (I, N) the learned similarity in the blocks 00, 11, 01, 10.
        distances: (I, N) of the same blocks, of projections of length 1.
        score_I: s of the anchors; it stands in the exponent, where the paper has it as a factor.
        own_IN: which pair is an image with itself: in the blocks of one view it counts 0, not exp(0).
        temperature: of the exponent.
        join: see `Join`; None if all anchors are here.
    """
    exponents = []
    for block, (m_IN, distance_IN) in enumerate(zip(m, distances, strict=True)):
        exponent_IN = score_I[:, None] * distance_IN * (2 * m_IN - 1) / temperature
        if block < 2:
            exponent_IN = exponent_IN.masked_fill(own_IN, torch.finfo(exponent_IN.dtype).min)
        exponents.append(exponent_IN.flatten())
    sums_R = torch.logsumexp(torch.cat(exponents), dim=0, keepdim=True)
    if join is not None:
        sums_R = join(sums_R)
    pairs = len(exponents) * own_IN.shape[1] ** 2
    return functional.softplus(torch.logsumexp(sums_R, dim=0) - math.log(pairs))


def released_constraint_loss(m: Sequence[Tensor], priors: Sequence[Tensor], *, join: Join | None = None) -> Tensor:
    """The mean over the blocks of ||M - prior||_F, a scalar: the norm, where the paper has its square.

    Args:
        m: (I, N) the learned similarity in each block.
        priors: (I, N) of the same blocks, without gradient.
        join: see `Join`; None if all anchors are here.
    """
    squares_14 = torch.stack(
        [(m_IN - prior_IN.detach()).square().sum() for m_IN, prior_IN in zip(m, priors, strict=True)]
    )[None]
    if join is not None:
        squares_14 = join(squares_14)
    return squares_14.sum(dim=0).sqrt().mean()
