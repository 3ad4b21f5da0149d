"""Optimisers: which parameters decay, how schedules reach the groups, how gradients are clipped."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from stages.training.optim import build_optimizer, clip_gradients, set_schedule
from stages.training.settings import LoopSettings, OptimizerSettings


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


def first_updates(settings: OptimizerSettings) -> dict[str, torch.Tensor]:
    """How far each parameter of a linear layer and a norm moves in the first step, where every gradient is 1."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    optimizer = build_optimizer(module, settings)
    set_schedule(optimizer, settings, step=0, total=10, steps_per_epoch=5, batch_size=2048)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {name: before[name] - value.detach() for name, value in module.named_parameters()}


def test_biases_and_norms_move_at_a_rate_of_their_own() -> None:
    """Barlow Twins: LARS with 0.2 for weights and, not adapted, 0.0048 for the rest, both times batch / 256."""
    fields = {"name": "lars", "lr": 0.2, "lr_per": 256, "weight_decay": 0.0}
    plain, own = (first_updates(OptimizerSettings(**fields, lr_biases=each)) for each in (None, 0.0048))
    for name in ("0.bias", "1.weight", "1.bias"):
        torch.testing.assert_close(plain[name], torch.full_like(plain[name], 0.2 * 8))
        torch.testing.assert_close(own[name] / plain[name], torch.full_like(own[name], 0.0048 / 0.2))
    assert torch.equal(own["0.weight"], plain["0.weight"])
    # Weights are adapted also without a decay: lr * trust * ||w|| / ||gradient||.
    torch.manual_seed(0)
    weight = nn.Linear(4, 3).weight.detach()
    torch.testing.assert_close(own["0.weight"], torch.full((3, 4), 1.6 * 0.001 * (weight.norm() / 12**0.5).item()))


@pytest.mark.parametrize("decay_all", [False, True])
def test_the_rate_of_biases_follows_the_schedule(decay_all: bool) -> None:
    settings = OptimizerSettings(
        name="sgd", lr=0.4, lr_biases=0.1, lr_end=0.004, warmup_epochs=1, lr_start=0.04, decay_all=decay_all
    )
    optimizer = build_optimizer(nn.Linear(4, 4), settings)
    for step in range(10):
        lr, decay = set_schedule(optimizer, settings, step=step, total=10, steps_per_epoch=3, batch_size=64)
        weights, biases = optimizer.param_groups
        assert (weights["lr"], biases["lr"]) == (pytest.approx(lr), pytest.approx(lr / 4))
        assert biases["weight_decay"] == (decay if decay_all else 0.0)


def test_the_learning_rate_drops_before_the_end() -> None:
    settings = OptimizerSettings(lr=1.0, warmup_epochs=1, lr_drops=[2, 1], lr_drop=0.2)
    optimizer = build_optimizer(nn.Linear(4, 4), settings)
    steps = {
        step: set_schedule(optimizer, settings, step=step, total=20, steps_per_epoch=4, batch_size=1)[0]
        for step in range(20)
    }
    assert [steps[step] for step in (0, 3, 4, 11)] == [0.0, 1.0, 1.0, 1.0]
    assert [steps[step] for step in (12, 15, 16, 19)] == pytest.approx([0.2, 0.2, 0.04, 0.04])
    with pytest.raises(ValidationError, match="numbers above 0"):
        OptimizerSettings(lr_drops=[-1])
    with pytest.raises(ValidationError, match="50 epochs before the end is before the start of 30 epochs"):
        LoopSettings(epochs=30, optimizer={"lr_drops": [50, 25]})


def test_clipping_is_by_tensor_or_over_all() -> None:
    def gradients(mode: str) -> list[float]:
        parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
        parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4])
        total = clip_gradients(parameters, OptimizerSettings(clip=1.0, clip_mode=mode))
        assert total.item() == pytest.approx((25 + 0.25) ** 0.5)
        return [parameter.grad.norm().item() for parameter in parameters]

    assert gradients("tensor") == pytest.approx([1.0, 0.5], abs=1e-5)
    assert gradients("global") == pytest.approx([5 / 25.25**0.5, 0.5 / 25.25**0.5], abs=1e-5)


def rates(settings: OptimizerSettings, total: int) -> list[float]:
    optimizer = build_optimizer(nn.Linear(2, 2), settings)
    given = {"total": total, "steps_per_epoch": 5, "batch_size": 8}
    return [set_schedule(optimizer, settings, step=step, **given)[0] for step in range(total)]


def test_a_power_of_the_steps_left_after_a_warm_up_in_steps() -> None:
    line = OptimizerSettings(lr=1.0, lr_end=0.0, lr_power=1.0, warmup_steps=3)
    assert rates(line, 7) == pytest.approx([0, 0.5, 1, 1, 0.75, 0.5, 0.25])
    bent = OptimizerSettings(lr=1.0, lr_end=0.2, lr_power=0.9)
    assert rates(bent, 4) == pytest.approx([0.2 + 0.8 * (1 - t / 4) ** 0.9 for t in range(4)])


def test_options_that_are_not_set_are_in_no_fingerprint() -> None:
    assert not {"lr_power", "warmup_steps"} & OptimizerSettings().model_dump().keys()
    assert OptimizerSettings(lr_power=1.0).model_dump()["lr_power"] == 1.0
