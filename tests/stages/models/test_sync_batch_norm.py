"""Synchronised batch norm on CPUs: two processes equal one, and one equals torch's own."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import nn

from stages.models.sync_batch_norm import SyncBatchNorm, SyncBatchNormAct, convert
from tests.stages.pretrain.methods.ranks import Results, on_two


def network() -> nn.Module:
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), BatchNormAct2d(4, momentum=None)]
    head = [nn.Flatten(), nn.Linear(4 * 16, 6), nn.BatchNorm1d(6, affine=False)]
    return nn.Sequential(*parts, *head).double()


def inputs() -> torch.Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double() * 3 + 2


def loss(out: torch.Tensor) -> torch.Tensor:
    return (out * torch.arange(6.0).double()).pow(3).mean(dim=1)


def test_alone_it_is_torchs_own() -> None:
    plain, sync = network(), convert(network())
    assert isinstance(sync[1], SyncBatchNorm)
    assert isinstance(sync[4], SyncBatchNormAct)
    assert list(sync.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(sync(inputs()), plain(inputs()))
    for (name, mine), theirs in zip(sync.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)
    torch.testing.assert_close(sync.eval()(inputs()), plain.eval()(inputs()))


def test_it_is_converted_once_and_keeps_its_parameters() -> None:
    module = network()
    before = dict(module.named_parameters())
    converted = convert(module)
    assert all(parameter is before[name] for name, parameter in converted.named_parameters())
    first = converted[1]
    assert convert(converted)[1] is first
    copied = copy.deepcopy(converted)
    assert isinstance(copied[4].act, nn.ReLU)
    assert isinstance(convert(nn.BatchNorm1d(3)), SyncBatchNorm)


def _train(rank: int, world_size: int) -> Results:
    module = convert(network())
    nn.parallel.DistributedDataParallel(module)  # refuses torch's own batch norm on CPUs
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    rows = slice(0, 2) if rank == 0 else slice(2, 6)  # uneven shares
    mine = inputs()[rows].requires_grad_()
    for _ in range(2):
        loss(module(mine)).sum().backward()
        for parameter in module.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= 6
        optimizer.step()
        optimizer.zero_grad()
    return {"state": module.state_dict(), "grad": mine.grad}


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    two = on_two(_train, tmp_path)
    module, batch = network(), inputs().requires_grad_()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    for _ in range(2):
        loss(module(batch)).sum().backward()
        for parameter in module.parameters():
            parameter.grad /= 6
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(torch.cat([part["grad"] for part in two]), batch.grad)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(two[0]["state"][name], value, msg=name)
        torch.testing.assert_close(two[1]["state"][name], value, msg=name)
