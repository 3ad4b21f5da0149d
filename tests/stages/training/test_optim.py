"""Optimisers: which parameters decay, how schedules reach the groups, how gradients are clipped."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stages.training.optim import build_optimizer, clip_gradients, set_schedule
from stages.training.settings import OptimizerSettings


def test_weight_decay_spares_biases_and_norms() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    decayed, plain = build_optimizer(module, OptimizerSettings(weight_decay=0.3)).param_groups
    assert [p.ndim for p in decayed["params"]] == [2]
    assert len(plain["params"]) == 3
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_schedule_reaches_the_groups(name: str) -> None:
    settings = OptimizerSettings(name=name, lr=0.1, lr_per=256, lr_end=0.0, weight_decay=0.1, weight_decay_end=0.2)
    optimizer = build_optimizer(nn.Linear(4, 4), settings)
    lr, decay = set_schedule(optimizer, settings, step=0, total=10, steps_per_epoch=5, batch_size=512)
    assert (lr, decay) == (pytest.approx(0.2), pytest.approx(0.1))
    lr, decay = set_schedule(optimizer, settings, step=5, total=10, steps_per_epoch=5, batch_size=512)
    assert (lr, decay) == (pytest.approx(0.1), pytest.approx(0.15))
    assert optimizer.param_groups[0]["lr"] == lr
    assert optimizer.param_groups[1]["weight_decay"] == 0.0


def test_clipping_is_by_tensor_or_over_all() -> None:
    def gradients(mode: str) -> list[float]:
        parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
        parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4])
        total = clip_gradients(parameters, OptimizerSettings(clip=1.0, clip_mode=mode))
        assert total.item() == pytest.approx((25 + 0.25) ** 0.5)
        return [parameter.grad.norm().item() for parameter in parameters]

    assert gradients("tensor") == pytest.approx([1.0, 0.5], abs=1e-5)
    assert gradients("global") == pytest.approx([5 / 25.25**0.5, 0.5 / 25.25**0.5], abs=1e-5)
