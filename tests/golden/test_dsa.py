"""DSA against brute force of its equations (dsa_small, _unnormalised, _defaults_eta20, _class_metrics).

Its released variant against the authors' functions (dsa_released).
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional
from lightly.loss import NTXentLoss
from torch import nn

from stages.evaluate.class_separation import class_separation
from stages.pretrain.methods.dsa.losses.dsa_arranging import (
    arrange,
    arranging_loss,
    constraint_loss,
    pair_distances,
    pair_scores,
)
from stages.pretrain.methods.dsa.losses.dsa_released import (
    released_arranging_loss,
    released_constraint_loss,
    released_prior,
    second_order_scores,
)
from stages.pretrain.methods.dsa.losses.dsa_scoring import connection_scores, neighbourhood, prior_similarity
from stages.pretrain.methods.dsa.released import Concatenations, Differences, blocks
from tests.golden.golden import assert_close, load, tensors

FILES = ["dsa_small", "dsa_unnormalised", "dsa_defaults_eta20"]


@pytest.mark.parametrize("name", FILES)
def test_scoring_module(name: str) -> None:
    golden = tensors(name)
    distance = pair_distances(golden["z_aux"], golden["z_aux"])
    assert_close(distance.square(), golden["dist_aux_sq"], 1e-9)
    assert_close(prior_similarity(distance, tau=golden["tau_pre"].item()), golden["M_pre"], 1e-9)
    neighbors = neighbourhood(distance, int(golden["eta"]))
    assert torch.equal(neighbors, golden["nn_index"].long())
    scores = connection_scores(neighbors, dtype=torch.float64)
    assert_close(scores, golden["sc"], 1e-12)
    assert_close(scores * neighbors.shape[1], golden["conn_score"], 1e-9)


@pytest.mark.parametrize("activation", ["relu", "softplus", "exp"])
@pytest.mark.parametrize("name", FILES)
def test_arranging_module_values_and_gradients(name: str, activation: str) -> None:
    golden = tensors(name)
    z, w1, w2 = (golden[key].requires_grad_() for key in ("z", "W1", "W2"))
    width = z.shape[1]
    used = functional.normalize(z, dim=1) if bool(load(name)["normalize_z"]) else z
    assert_close(used, golden["z_used"], 1e-12)
    score = pair_scores(z @ w1[:, :width].T + golden["b1"], z @ w1[:, width:].T, w2) + golden["b2"]
    assert_close(score, golden["raw_score"], 1e-9)
    m = arrange(score, activation)
    assert_close(m, golden[f"M_{activation}"], 1e-9)
    distance = pair_distances(used, used)
    assert_close(distance, golden["dist"], 1e-9)

    knobs = {"alpha": golden["alpha"].item(), "tau": golden["tau"].item()}
    plain = arranging_loss(m, distance, torch.ones_like(golden["sc"]), **knobs)
    scored = arranging_loss(m, distance, golden["sc"], **knobs)
    constraint = constraint_loss(m, golden["M_pre"])
    assert_close(plain, golden[f"L_AM_{activation}"], 1e-9)
    assert_close(scored, golden[f"L_AM_s_{activation}"], 1e-9)
    assert_close(constraint, golden[f"L_con_{activation}"], 1e-9)
    total = golden["nu"] * scored + golden["upsilon"] * constraint
    assert_close(total, golden[f"reg_total_{activation}"], 1e-9)
    if activation == "exp":
        assert_close(arranging_loss(m, distance**2, golden["sc"], **knobs), golden["L_AM_s_exp_sqdist"], 1e-9)

    total.backward()
    for key, value in (("z", z), ("W1", w1), ("W2", w2)):
        assert_close(value.grad, golden[f"grad_{key}_{activation}"], 1e-9)


BLOCKS = ("00", "11", "01", "10")


def test_released_scores_and_priors() -> None:
    golden = tensors("dsa_released")
    original, first, second = (functional.normalize(golden[key], dim=1) for key in ("aux_original", "aux0", "aux1"))
    neighbors = neighbourhood(pair_distances(original, original), int(golden["eta"]))
    scores = second_order_scores(neighbors, more_than=int(golden["mu"]), dtype=torch.float64)
    assert_close(scores, golden["s"], 1e-12)
    for block, distance in zip(BLOCKS, blocks(first, second, first, second), strict=True):
        assert_close(released_prior(distance, tau=golden["tau"].item()), golden[f"M_pre_{block}"], 1e-9)


@pytest.mark.parametrize(("form", "network"), [("difference", Differences), ("pair", Concatenations)])
def test_released_terms_and_gradients(form: str, network: type[Differences | Concatenations]) -> None:
    golden = tensors("dsa_released")
    first, second = golden["x0"].requires_grad_(), golden["x1"].requires_grad_()
    arranger = network(first.shape[1]).double()
    arranger.hidden.weight, arranger.hidden.bias = (
        nn.Parameter(golden[f"W1_{form}"]),
        nn.Parameter(golden[f"b1_{form}"]),
    )
    arranger.output.weight = nn.Parameter(golden[f"W2_{form}"][None])
    arranger.output.bias = nn.Parameter(golden[f"b2_{form}"][None])

    m_00, m_11 = arranger(first, first), arranger(second, second)
    m = [m_00, m_11, m_00, m_11]
    for block, found in zip(BLOCKS, m, strict=True):
        assert_close(found, golden[f"M_{form}_{block}"], 1e-9)
    units = [functional.normalize(z, dim=1) for z in (first, second, first, second)]
    own = torch.eye(len(first), dtype=torch.bool)
    temperature = golden["temperature"].item()
    arranging = released_arranging_loss(m, blocks(*units), golden["s"], own, temperature=temperature)
    constraint = released_constraint_loss(m, [golden[f"M_pre_{block}"] for block in BLOCKS])
    assert_close(arranging, golden[f"L_arrange_{form}"], 1e-9)
    assert_close(golden["lambda2"] * 4 * constraint, golden[f"L_constraint_{form}"], 1e-9)
    host = NTXentLoss(temperature=0.5)(first, second)
    total = host + golden["lambda1"] * arranging + golden["lambda2"] * constraint
    assert_close(total, golden[f"total_{form}"], 1e-9)

    total.backward()
    for key, value in (
        ("x0", first.grad),
        ("x1", second.grad),
        ("W1", arranger.hidden.weight.grad),
        ("W2", arranger.output.weight.grad[0]),
    ):
        assert_close(value, golden[f"grad_{key}_{form}"], 1e-9)


def test_class_separation() -> None:
    golden = tensors("dsa_class_metrics")
    found = class_separation(golden["X"], golden["y"].long())
    assert_close(found.means, golden["mu"], 1e-12)
    assert_close(found.variances, golden["var_per_class"], 1e-12)
    assert_close(found.inter_class_distance, golden["inter_class_distance"], 1e-12)
    assert_close(found.intra_class_variance, golden["intra_class_variance"], 1e-12)
