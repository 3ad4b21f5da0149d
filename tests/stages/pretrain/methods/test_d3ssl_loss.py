"""The region contrast against its definition, with a bank in part unused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from stages.evaluate.coupling import coupling_rate
from stages.pretrain.methods.d3ssl.losses.d3ssl_loss import bank_nce, depositioning_loss


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def by_definition(z: Tensor, positive: Tensor, negatives: Tensor, temperature: float) -> float:
    wanted = math.exp(float(z @ positive) / temperature)
    return -math.log(wanted / (wanted + sum(math.exp(float(z @ n) / temperature) for n in negatives)))


@pytest.mark.parametrize("filled", [0, 1, 5, 9])
def test_nce_equals_its_definition_whatever_part_of_the_bank_is_used(filled: int) -> None:
    z, positives, bank = unit(4, 6).requires_grad_(), unit(2, 4, 6, seed=1), unit(9, 6, seed=2)
    loss_PN = bank_nce(z, positives, bank, temperature=0.2, filled=torch.tensor(filled))
    for p in range(2):
        for i in range(4):
            expected = by_definition(z[i].detach(), positives[p, i], bank[:filled], 0.2)
            assert loss_PN[p, i].item() == pytest.approx(expected, abs=1e-12)
    loss_PN.sum().backward()
    assert torch.isfinite(z.grad).all()
    assert (z.grad.abs().sum() > 0) == (filled > 0)


def test_only_the_student_gets_a_gradient() -> None:
    z, first, second, bank = (unit(4, 6, seed=i).requires_grad_() for i in range(4))
    depositioning_loss(z, first, second, bank).sum().backward()
    assert z.grad is not None
    assert first.grad is second.grad is bank.grad is None


def test_large_logits_stay_finite_in_float32() -> None:
    z = unit(4, 6).float().requires_grad_()
    loss = bank_nce(z, -z.detach()[None], z.detach(), temperature=0.005)
    assert torch.isfinite(loss).all()
    assert loss.min() > 300
    loss.sum().backward()
    assert torch.isfinite(z.grad).all()


def test_coupling_leaves_out_pairs_that_say_nothing() -> None:
    other = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    alone = torch.tensor([[0.0, 1.0], [1.0, 1.0]])  # the first is orthogonal to the other object
    together = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    assert coupling_rate(together, alone, other).tolist() == pytest.approx([1.0])
