"""CoTAP's ranking loss and everything it bounds, against the golden files, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stages.pretrain.methods.cotap.losses.cotap_ranking import cotap_ranking_loss, dominated_sums
from tests.golden import cotap_reference as reference
from tests.golden.golden import assert_close, tensors

FILES = ["cotap_n16", "cotap_n64", "cotap_n400", "cotap_n64_ties", "cotap_n64_alt_tau"]


@pytest.mark.parametrize("name", FILES)
def test_training_loss_and_gradient(name: str) -> None:
    golden = tensors(name)
    tau1, tau2 = golden["tau1"].item(), golden["tau2"].item()
    p = golden["p"].requires_grad_()
    loss = cotap_ranking_loss(p[None], golden["q"][None], tau1=tau1, tau2=tau2)[0]
    loss.backward()
    assert_close(loss, golden["eq12_loss"], 1e-10)
    assert_close(p.grad, golden["eq12_grad_p"], 1e-10)


@pytest.mark.parametrize("name", [name for name in FILES if name != "cotap_n64_ties"])  # ties: p is rounded
def test_gradient_reaches_the_features(name: str) -> None:
    golden = tensors(name)
    fo_u, fo_v = golden["fo_u"].requires_grad_(), golden["fo_v"].requires_grad_()
    p = (0.5 * fo_u @ fo_v.T + 0.5).flatten()
    q = (0.5 * golden["ft_u"] @ golden["ft_v"].T + 0.5).flatten()
    loss = cotap_ranking_loss(p[None], q[None], tau1=golden["tau1"].item(), tau2=golden["tau2"].item())
    loss.sum().backward()
    assert_close(p, golden["p"], 1e-10)
    assert_close(fo_u.grad, golden["eq12_grad_fo_u"], 1e-10)
    assert_close(fo_v.grad, golden["eq12_grad_fo_v"], 1e-10)


def pairs_below(p: Tensor, level: Tensor) -> Tensor:
    """For every i, #{j: level_j < level_i, p_j < p_i}, by the sums that the loss is made of."""
    sorted_p, order = p.sort()
    below = torch.searchsorted(sorted_p, sorted_p)
    sums = dominated_sums(level[order][None], torch.ones_like(p)[None, None], below[None, None])[0, 0, 0]
    return torch.empty_like(sums).scatter_(0, order, sums)


@pytest.mark.parametrize("name", FILES)
def test_dominated_sums_give_equations_9_10_and_proposition_1(name: str) -> None:
    golden = tensors(name)
    p, q = golden["p"], golden["q"]
    not_below = (p[:, None] <= p).sum(1)  # #{j: p_i <= p_j}
    ap = []
    for threshold in q:
        positive = q >= threshold
        wrong = (~positive).sum() - pairs_below(p, positive.long())[positive]
        ap.append((wrong / not_below[positive]).mean())
    ap_losses = torch.stack(ap)
    assert_close(ap_losses, golden["eq9_ap_per_threshold"], 1e-10)
    assert_close(ap_losses.mean(), golden["eq10_gamma_unit"], 1e-10)
    assert_close((golden["gamma_for_tau1"] * ap_losses).mean(), golden["eq10_gamma_tau1"], 1e-10)

    smaller = len(q) - golden["rank_q"].long()  # #{j: q_j < q_i}
    wrong = smaller - pairs_below(p, smaller)  # of those, the ones with p_i <= p_j
    assert_close(wrong, golden["count_neg"], 1e-10)
    psi = 1 / (not_below - wrong)
    assert_close(psi, golden["psi"], 1e-10)
    for gamma in ("unit", "tau1"):
        bound = (golden[f"gamma_tilde_{gamma}"] * reference.g(psi * wrong)).mean()
        assert_close(bound, golden[f"prop1_gamma_{gamma}"], 1e-10)


@pytest.mark.parametrize("name", FILES)
def test_every_pairs_share_of_the_loss(name: str) -> None:
    """With tau1 at each q_k in turn, the losses together fix what every pair adds to them."""
    golden = tensors(name)
    p, q, tau2 = golden["p"], golden["q"], golden["tau2"].item()
    share = reference.g(golden["psi"] * golden["eq12_inner_sum"])
    expected = ((q - q[:, None]).clamp(min=0) * share).mean(1)
    losses = [cotap_ranking_loss(p[None], q[None], tau1=tau1.item(), tau2=tau2)[0] for tau1 in q]
    assert_close(torch.stack(losses), expected, 1e-10)


@pytest.mark.parametrize("name", FILES)
def test_the_loss_bounds_proposition_1_which_bounds_equation_10(name: str) -> None:
    golden = tensors(name)
    loss = cotap_ranking_loss(
        golden["p"][None], golden["q"][None], tau1=golden["tau1"].item(), tau2=golden["tau2"].item()
    )[0]
    assert golden["eq10_gamma_tau1"] <= golden["prop1_gamma_tau1"] <= loss
    # A margin without end counts every smaller pair as wrong; the gain is that of the file.
    endless = cotap_ranking_loss(golden["p"][None], golden["q"][None], tau1=golden["tau1"].item(), tau2=1e12)[0]
    smaller = len(golden["q"]) - golden["rank_q"]
    expected = (golden["gamma_tilde_tau1"] * reference.g(golden["psi"] * smaller)).mean()
    assert_close(endless, expected, 1e-10)


def test_surrogate() -> None:
    """Of two pairs with q = 1 and 0 and tau1 = 0, the loss is half of g(h(p_0 - p_1))."""
    golden = tensors("cotap_huber")
    x = golden["x"]
    p = torch.stack([x, torch.zeros_like(x)], dim=1)
    q = torch.tensor([1.0, 0.0], dtype=x.dtype).expand_as(p)
    for tau2, y in zip(golden["tau2"], golden["y"], strict=True):
        loss = cotap_ranking_loss(p, q, tau1=0.0, tau2=tau2.item())
        assert_close(loss, reference.g(y) / 2, 1e-12)
        assert_close(reference.surrogate(x, tau2.item()), y, 1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 255, 700])
@pytest.mark.parametrize("decimals", [None, 1, 2])
@pytest.mark.parametrize(("tau1", "tau2"), [(-0.2, 0.5), (0.55, 0.1), (0.0, 2.0)])
def test_a_batch_equals_the_double_loop(n: int, decimals: int | None, tau1: float, tau2: float) -> None:
    generator = torch.Generator().manual_seed(n)
    p = torch.rand(3, n, generator=generator, dtype=torch.float64)
    q = 0.5 * p + 0.5 * torch.rand(3, n, generator=generator, dtype=torch.float64)
    if decimals is not None:
        p, q = p.round(decimals=decimals), q.round(decimals=decimals)
    p.requires_grad_()
    losses = cotap_ranking_loss(p, q, tau1=tau1, tau2=tau2)
    cotangent = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    grad = torch.autograd.grad((losses * cotangent).sum(), p)[0]

    slow = torch.stack([reference.training_loss(p[b], q[b], tau1, tau2) for b in range(3)])
    slow_grad = torch.autograd.grad((slow * cotangent).sum(), p)[0]
    assert_close(losses, slow, 1e-10)
    assert_close(grad, slow_grad, 1e-10)


def test_float32_is_exact_to_five_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    q = (0.5 + 0.15 * torch.randn(2401, generator=generator)).clamp(0, 1)
    p = (0.7 * q + 0.15 + 0.05 * torch.randn(2401, generator=generator)).clamp(0, 1).requires_grad_()
    loss = cotap_ranking_loss(p[None], q[None])[0]
    loss.backward()
    wide = p.detach().double().requires_grad_()
    truth = reference.training_loss(wide, q.double(), -0.2, 0.5)
    truth.backward()
    assert abs(loss.item() - truth.item()) <= 1e-5 * abs(truth.item())
    assert (p.grad - wide.grad).norm() <= 1e-5 * wide.grad.norm()


def test_equals_the_row_chunked_loop_of_the_benchmark() -> None:
    golden = tensors("cotap_n400")
    tau1, tau2 = golden["tau1"].item(), golden["tau2"].item()
    fast, slow = golden["p"].clone().requires_grad_(), golden["p"].clone().requires_grad_()
    loss = cotap_ranking_loss(fast[None], golden["q"][None], tau1=tau1, tau2=tau2)[0]
    chunked = reference.RowChunked.apply(slow, golden["q"], tau1, tau2, 7)
    loss.backward()
    chunked.backward()
    assert_close(loss, golden["eq12_loss"], 1e-10)
    assert_close(loss, chunked, 1e-10)
    assert_close(fast.grad, slow.grad, 1e-10)


def test_dominated_sums_count_what_they_say() -> None:
    generator = torch.Generator().manual_seed(3)
    level = torch.randint(0, 37, (2, 37), generator=generator)
    ends = torch.randint(0, 38, (2, 2, 37), generator=generator)
    summands = torch.randn(2, 2, 37, generator=generator, dtype=torch.float64)
    index = torch.arange(37)
    member = (index < ends[..., None]) & (level[:, None, :] < level[:, :, None])  # (E, B, i, j)
    expected = torch.einsum("ebij,bsj->ebsi", member.double(), summands)
    assert_close(dominated_sums(level, summands, ends), expected, 1e-12)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="must both be"):
        cotap_ranking_loss(torch.rand(2, 4), torch.rand(2, 5))
    with pytest.raises(ValueError, match="tau2"):
        cotap_ranking_loss(torch.rand(2, 4), torch.rand(2, 4), tau2=0.0)
