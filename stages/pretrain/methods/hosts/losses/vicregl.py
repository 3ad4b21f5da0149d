"""VICRegL's losses: VICReg of the views' vectors and of their matched cells.

Source: docs/methods.md#vicregl.

A view's matches fill numbered slots, and variances and covariances are computed for each slot, so the order of matches
counts. The official code keeps the cells' order, row by row; lightly's form of the loss orders them by distance. Here
`order` chooses.

Shape legend: B images, D width of a vector or cell, N M cells of two views' maps, S match slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

MatchOrder = Literal["raster", "distance"]
Gather = Callable[[Tensor], Tensor]  # rows of this rank -> rows of all ranks, with gradient


class ProjectedView(NamedTuple):
    """The projections of one view."""

    vector: Tensor  # (B, D)
    map: Tensor  # (B, N, D)
    places: Tensor  # (B, N, 2), centres of the cells in pixels of the stored image


class VICRegParts(NamedTuple):
    """The three parts of VICReg, unweighted: squared distance, hinge of standard deviations, squared covariances."""

    invariance: Tensor
    variance: Tensor
    covariance: Tensor

    def weighted(self, invariance: float, variance: float, covariance: float) -> Tensor:
        """The sum of the parts with these weights."""
        return invariance * self.invariance + variance * self.variance + covariance * self.covariance


def global_parts(
    views: Sequence[ProjectedView], others: Sequence[ProjectedView] = (), *, gather: Gather | None = None
) -> VICRegParts:
    """VICReg of the vectors. Invariance is averaged over pairs of a large view and any other, the rest over views.

    Args:
        views: the large crops.
        others: the small crops, which are compared with the large ones.
        gather: for the variances and covariances; None if all images are here.
    """
    every = [*views, *others]
    pairs = [
        functional.mse_loss(a.vector, b.vector) for i, a in enumerate(views) for j, b in enumerate(every) if i != j
    ]
    vectors = [_all(view.vector, gather)[:, None] for view in every]
    variance = torch.stack([_variance(x) for x in vectors]).mean()
    return VICRegParts(torch.stack(pairs).mean(), variance, torch.stack([_covariance(x) for x in vectors]).mean())


def local_parts(
    views: Sequence[ProjectedView],
    others: Sequence[ProjectedView] = (),
    *,
    num_matches: tuple[int, int] = (20, 4),
    order: MatchOrder = "raster",
    gather: Gather | None = None,
) -> VICRegParts:
    """VICReg of matched cells, for every ordered pair of a large view and any other.

    Cells are matched to the nearest cell of the other view in two ways: by feature and by place. The two ways are
    summed; the two directions of a pair are averaged, and so are the pairs.

    Args:
        views: the large crops.
        others: the small crops, which are compared with the large ones.
        num_matches: how many of the closest matches are kept from the first and from the second view of a pair; all
            of them if there are fewer.
        order: of the matches: that of the cells, row by row, or by distance.
        gather: for the variances and covariances; None if all images are here.
    """
    every = [*views, *others]
    pairs = []
    for i, a in enumerate(views):
        for j, b in enumerate(every):
            if i == j:
                continue
            by_feature_BNM = torch.cdist(a.map.detach(), b.map.detach())
            by_place_BNM = torch.cdist(a.places, b.places)
            for distance_BNM in (by_feature_BNM, by_place_BNM):
                there = _matched(a.map, b.map, distance_BNM, num_matches[0], order)
                back = _matched(b.map, a.map, distance_BNM.transpose(1, 2), num_matches[1], order)
                pairs += [_slot_parts(*there, gather), _slot_parts(*back, gather)]
    # Each pair has four entries, and two ways to match are summed where the mean would average them: hence the 2.
    return VICRegParts(*(2 * torch.stack(part).mean() for part in zip(*pairs, strict=True)))


def _matched(
    from_BND: Tensor, to_BMD: Tensor, distance_BNM: Tensor, count: int, order: MatchOrder
) -> tuple[Tensor, Tensor]:
    """The `count` closest matches, as cells of the one view and of the other: (B, S, D) each."""
    nearest_BN, where_BN = distance_BNM.min(dim=2)
    chosen_BS = nearest_BN.topk(min(count, nearest_BN.shape[1]), dim=1, largest=False).indices
    if order == "raster":
        chosen_BS = chosen_BS.sort(dim=1).values
    partner_BS = where_BN.gather(1, chosen_BS)
    width = from_BND.shape[2]
    return (
        from_BND.gather(1, chosen_BS[..., None].expand(-1, -1, width)),
        to_BMD.gather(1, partner_BS[..., None].expand(-1, -1, width)),
    )


def _slot_parts(a_BSD: Tensor, b_BSD: Tensor, gather: Gather | None) -> VICRegParts:
    invariance = functional.mse_loss(a_BSD, b_BSD)
    a_BSD, b_BSD = _all(a_BSD, gather), _all(b_BSD, gather)
    variance = 0.5 * (_variance(a_BSD) + _variance(b_BSD))
    return VICRegParts(invariance, variance, 0.5 * (_covariance(a_BSD) + _covariance(b_BSD)))


def _variance(x_BSD: Tensor) -> Tensor:
    return functional.relu(1 - torch.sqrt(x_BSD.var(dim=0) + 1e-4)).mean()


def _covariance(x_BSD: Tensor) -> Tensor:
    """Sum of the squared off-diagonal covariances over the batch, divided by D, averaged over slots."""
    centred_SBD = (x_BSD - x_BSD.mean(dim=0)).transpose(0, 1)
    cov_SDD = centred_SBD.transpose(1, 2) @ centred_SBD / (len(x_BSD) - 1)
    squared_S = cov_SDD.square().sum(dim=(1, 2)) - cov_SDD.diagonal(dim1=1, dim2=2).square().sum(dim=1)
    return (squared_S / x_BSD.shape[2]).mean()


def _all(rows: Tensor, gather: Gather | None) -> Tensor:
    return rows if gather is None else gather(rows)
