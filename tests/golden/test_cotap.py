"""CoTAP's ranking loss and everything it bounds, against the golden files, values and gradients."""

from __future__ import annotations

import pytest
import torch

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


@pytest.mark.parametrize("name", FILES)
def test_gradient_reaches_the_features(name: str) -> None:
    golden = tensors(name)
    if golden["eq12_grad_fo_u"].ndim == 0 or golden["eq12_grad_fo_u"].numel() == 0:
        pytest.skip("the file holds no feature gradients")
    fo_u, fo_v = golden["fo_u"].requires_grad_(), golden["fo_v"].requires_grad_()
    p = (0.5 * fo_u @ fo_v.T + 0.5).flatten()
    q = (0.5 * golden["ft_u"] @ golden["ft_v"].T + 0.5).flatten()
    loss = cotap_ranking_loss(p[None], q[None], tau1=golden["tau1"].item(), tau2=golden["tau2"].item())
    loss.sum().backward()
    assert_close(p, golden["p"], 1e-10)
    assert_close(fo_u.grad, golden["eq12_grad_fo_u"], 1e-10)
    assert_close(fo_v.grad, golden["eq12_grad_fo_v"], 1e-10)


@pytest.mark.parametrize("name", FILES)
def test_equations_9_10_and_proposition_1(name: str) -> None:
    golden = tensors(name)
    p, q, tau1, tau2 = golden["p"], golden["q"], golden["tau1"].item(), golden["tau2"].item()
    ap = torch.stack([reference.ap_loss(p, q, t.item()) for t in q])
    assert_close(ap, golden["eq9_ap_per_threshold"], 1e-10)
    assert_close((q[None] >= q[:, None]).sum(1), golden["rank_q"], 1e-10)
    unit = torch.ones_like(q)
    assert_close(reference.exact_loss(p, q, unit), golden["eq10_gamma_unit"], 1e-10)
    assert_close(reference.cumulated_gain(q, unit), golden["gamma_tilde_unit"], 1e-10)
    assert_close(reference.upper_bound(p, q, golden["gamma_tilde_unit"]), golden["prop1_gamma_unit"], 1e-10)
    gain = reference.cumulated_gain(q, golden["gamma_for_tau1"])
    assert_close(gain, golden["gamma_tilde_tau1"], 1e-10)
    assert_close(gain, (q - tau1).clamp(min=0), 1e-10)
    assert_close(reference.exact_loss(p, q, golden["gamma_for_tau1"]), golden["eq10_gamma_tau1"], 1e-10)
    assert_close(reference.upper_bound(p, q, gain), golden["prop1_gamma_tau1"], 1e-10)
    assert_close(reference.psi(p, q), golden["psi"], 1e-10)
    assert_close(reference.negative_sums(p, q, tau2), golden["eq12_inner_sum"], 1e-10)
    # The training loss bounds Proposition 1, which bounds Eq. 10.
    loss = cotap_ranking_loss(p[None], q[None], tau1=tau1, tau2=tau2)[0]
    assert golden["eq10_gamma_tau1"] <= golden["prop1_gamma_tau1"] <= loss


def test_surrogate() -> None:
    golden = tensors("cotap_huber")
    y = torch.stack([reference.surrogate(golden["x"], tau2.item()) for tau2 in golden["tau2"]])
    assert_close(y, golden["y"], 1e-12)


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


def test_the_benchmarks_row_chunked_loop_is_the_same_loss() -> None:
    golden = tensors("cotap_n400")
    p = golden["p"].requires_grad_()
    loss = reference.RowChunked.apply(p, golden["q"], golden["tau1"].item(), golden["tau2"].item(), 7)
    loss.backward()
    assert_close(loss, golden["eq12_loss"], 1e-10)
    assert_close(p.grad, golden["eq12_grad_p"], 1e-10)


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
