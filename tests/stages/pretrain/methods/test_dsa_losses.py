"""DSA's losses: the network against real concatenations, memory, shares of ranks, anchors without weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stages.pretrain.methods.dsa.losses import dsa_arranging
from stages.pretrain.methods.dsa.losses.dsa_arranging import (
    arrange,
    arranging_loss,
    constraint_loss,
    pair_distances,
    pair_scores,
)
from stages.pretrain.methods.dsa.losses.dsa_released import column_sizes
from stages.pretrain.methods.dsa.losses.dsa_scoring import connection_scores, neighbourhood, prior_similarity


def concatenated(z_JD: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    """f_s on every concatenation, the slow and obvious way."""
    count = len(z_JD)
    pairs = torch.cat([z_JD[:, None].expand(-1, count, -1), z_JD[None].expand(count, -1, -1)], dim=2)
    return torch.relu(pairs @ w1.T + b1) @ w2


@pytest.mark.parametrize("chunk", [1, 300, 1 << 20])
def test_pair_scores_equal_the_network_on_concatenations(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dsa_arranging.CHUNK, "cpu", chunk)
    torch.manual_seed(0)
    z, w1, b1, w2 = torch.randn(9, 4), torch.randn(6, 8), torch.randn(6), torch.randn(6)
    leaves = [value.double().requires_grad_() for value in (z, w1, b1, w2)]
    weight = torch.randn(9, 9).double()
    expected = concatenated(*leaves)
    wanted = torch.autograd.grad((expected * weight).sum(), leaves)
    z, w1, b1, w2 = leaves
    scores = pair_scores(z @ w1[:, :4].T + b1, z @ w1[:, 4:].T, w2)
    torch.testing.assert_close(scores, expected)
    for mine, theirs in zip(torch.autograd.grad((scores * weight).sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_shares_of_two_ranks_make_the_whole() -> None:
    torch.manual_seed(1)
    z = torch.randn(8, 3).double()
    m, distance, score = arrange(torch.randn(8, 8).double()), pair_distances(z, z), torch.rand(8).double()
    whole = arranging_loss(m, distance, score)
    sums = [torch.logsumexp((score[r].log()[:, None] + (2 * m[r] - 1) * distance[r]).flatten(), 0) for r in ROWS]
    for r in ROWS:
        part = arranging_loss(m[r], distance[r], score[r], join=lambda mine: torch.stack(sums))
        torch.testing.assert_close(part, whole)


ROWS = [slice(0, 3), slice(3, 8)]


def test_outliers_pull_nothing_and_nothing_is_no_nan() -> None:
    z = torch.randn(6, 3, generator=torch.Generator().manual_seed(2)).requires_grad_()
    m = arrange(torch.zeros(6, 6))
    loss = arranging_loss(m, pair_distances(z, z), torch.zeros(6))
    loss.backward()
    assert loss == 0
    assert torch.equal(z.grad, torch.zeros_like(z))
    one = torch.zeros(6)
    one[2] = 0.5
    expected = torch.log(1 + 0.5 * ((2 * m[2] - 1) * pair_distances(z, z)[2]).exp().sum())
    torch.testing.assert_close(arranging_loss(m, pair_distances(z, z), one), expected)


def test_equal_views_have_distance_zero_and_no_nan_gradient() -> None:
    z = torch.ones(4, 3, requires_grad=True)
    arranging_loss(arrange(torch.zeros(4, 4)), pair_distances(z, z), torch.ones(4)).backward()
    assert torch.isfinite(z.grad).all()


def test_distances_are_those_of_cdist_with_its_gradient() -> None:
    torch.manual_seed(4)
    z, weight = torch.randn(9, 5).double(), torch.randn(9, 9).double()
    z[3] = z[7]
    leaves = z.clone().requires_grad_(), z.clone().requires_grad_()
    found, wanted = pair_distances(leaves[0], leaves[0]), torch.cdist(leaves[1], leaves[1])
    torch.testing.assert_close(found, wanted, atol=1e-7, rtol=1e-12)
    assert torch.equal(found.diagonal(), torch.zeros(9).double())
    assert found[3, 7] == 0
    weight.fill_diagonal_(0)
    weight[3, 7] = weight[7, 3] = 0
    for value in (found, wanted):
        (value * weight).sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    near = nn.functional.normalize(torch.randn(4, 64), dim=1)
    assert torch.equal(pair_distances(near, near.clone()).diagonal(), torch.zeros(4))  # float32 too


def test_prior_prefers_what_is_near_and_gets_no_gradient() -> None:
    points = torch.tensor([[0.0], [0.1], [5.0]], requires_grad=True)
    prior = prior_similarity(pair_distances(points, points))
    assert prior[0, 1] > prior[0, 2]
    torch.testing.assert_close(prior.sum(1), torch.ones(3))
    assert not prior.requires_grad
    m = torch.full((3, 3), 1 / 3, requires_grad=True)
    constraint_loss(m, prior).backward()
    torch.testing.assert_close(m.grad, 2 * (m - prior).detach())


def test_connection_scores_by_hand() -> None:
    # A line: 0 and 1 are mutual; 2's nearest is 1, which prefers 0; with two neighbours 3 is only near to itself.
    points = torch.tensor([[0.0], [1.0], [2.5], [9.0]])
    distance = pair_distances(points, points)
    assert neighbourhood(distance, 1).flatten().tolist() == [1, 0, 1, 2]
    assert connection_scores(neighbourhood(distance, 1)).tolist() == [1, 1, 0, 0]
    assert connection_scores(neighbourhood(distance, 2)).tolist() == [1, 1, 1, 0]
    assert neighbourhood(distance, 20).shape == (4, 3)
    assert connection_scores(neighbourhood(distance, 20)).tolist() == [1, 1, 1, 1]


def test_latent_connections_count_only_more() -> None:
    points = torch.randn(12, 2, generator=torch.Generator().manual_seed(3))
    neighbors = neighbourhood(pair_distances(points, points), 3)
    near = torch.zeros(12, 12, dtype=torch.bool)
    near[torch.arange(12)[:, None], neighbors] = True
    expected = []
    for i in range(12):
        found = 0
        for p in neighbors[i].tolist():
            via = any(near[q, i] and near[i, q] for q in neighbors[p].tolist())
            found += bool(near[p, i]) or via
        expected.append(found / 3)
    scores = connection_scores(neighbors, latent=True)
    torch.testing.assert_close(scores, torch.tensor(expected))
    assert (scores >= connection_scores(neighbors)).all()
    assert (scores > connection_scores(neighbors)).any()


def test_column_sizes_equal_the_sum_over_all_pairs() -> None:
    z = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).add_(50).requires_grad_()
    expected = (z[:, None] - z[None]).abs().sum(dim=(0, 1))
    weight = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(column_sizes(z), expected)
    (wanted,) = torch.autograd.grad(expected @ weight, z)
    (found,) = torch.autograd.grad(column_sizes(z) @ weight, z)
    torch.testing.assert_close(found, wanted)
