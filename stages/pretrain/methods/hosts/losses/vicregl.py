"""VICRegL: VICReg between views and between their matched local features (docs/methods.md#vicregl).

lightly has this loss too, but orders a view's matches by distance, where the official code keeps them in raster
order; variances and covariances are taken slot by slot, so the order counts. Here it is a choice.

Shape legend: B images, D width of a vector or local feature, N M cells of two views' maps, S match slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

MatchOrder = Literal["raster", "distance"]
Gather = Callable[[Tensor], Tensor]


class ProjectedView(NamedTuple):
    """One projected view."""

    vector: Tensor  # (B, D)
    map: Tensor  # (B, N, D)
    places: Tensor  # (B, N, 2), centres of the cells in the original image


class VICRegParts(NamedTuple):
    """Unweighted: mean squared distance, mean hinge of the standard deviations, squared covariances."""

    invariance: Tensor
    variance: Tensor
    covariance: Tensor

    def weighted(self, invariance: float, variance: float, covariance: float) -> Tensor:
        return invariance * self.invariance + variance * self.variance + covariance * self.covariance


def global_parts(
    views: Sequence[ProjectedView], others: Sequence[ProjectedView] = (), *, gather: Gather | None = None
) -> VICRegParts:
    """VICReg of the vectors: invariance averaged over (view, any other view) pairs, the rest over views.

    Args:
        views: large crops; others: small ones, which are compared with the large.
        gather: rows of all ranks, with gradient, for the statistics; None when all images are here.
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
    """VICReg of matched cells, for every ordered pair (large view, other view): matched by feature, and by place.

    Each direction keeps its `num_matches` cells (from the first view, from the second) that lie nearest to a cell of
    the other view, all of them where there are fewer. Directions are averaged, the two ways to match are summed, pairs
    are averaged.
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
    # Four entries a pair: two ways to match are summed, two directions averaged.
    return VICRegParts(*(2 * torch.stack(part).mean() for part in zip(*pairs, strict=True)))


def _matched(
    from_BND: Tensor, to_BMD: Tensor, distance_BNM: Tensor, count: int, order: MatchOrder
) -> tuple[Tensor, Tensor]:
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
    """Squared off-diagonal covariances over the batch, divided by D, averaged over slots."""
    centred_SBD = (x_BSD - x_BSD.mean(dim=0)).transpose(0, 1)
    cov_SDD = centred_SBD.transpose(1, 2) @ centred_SBD / (len(x_BSD) - 1)
    squared_S = cov_SDD.square().sum(dim=(1, 2)) - cov_SDD.diagonal(dim1=1, dim2=2).square().sum(dim=1)
    return (squared_S / x_BSD.shape[2]).mean()


def _all(rows: Tensor, gather: Gather | None) -> Tensor:
    return rows if gather is None else gather(rows)
