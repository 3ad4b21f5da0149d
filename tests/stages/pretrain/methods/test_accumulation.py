"""What a method says that it computes over one forward pass is what an accumulated step changes, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stages.pretrain.config.method import MethodSettings, method_settings
from tests.stages.pretrain.methods.tiny import share
from tests.stages.pretrain.methods.tiny_hosts import HOSTS, OURS, STEP, a_batch, build, settings

METHODS = {name: settings(name) for name in [*HOSTS, *OURS]} | {
    "dino, sinkhorn": method_settings({**OURS["dino"], "centering": "sinkhorn"}),
    "cotap, proto only": method_settings(
        {**OURS["cotap"], "weights": {"align_patch": 0, "align_image": 0, "sc_patch": 0, "sc_image": 0}}
    ),
    "dsa": settings("byol", dsa=True),
    "dsa, released": settings("byol", dsa=True, variant="released"),
}


@pytest.mark.parametrize("name", METHODS)
def test_two_passes_differ_from_one_where_the_method_says_so(name: str) -> None:
    """Batch norms, which it leaves out, see no batch here."""
    config = METHODS[name]
    whole, halves = terms(config, 1), terms(config, 2)
    if config.over_one_pass():
        assert not torch.allclose(whole, halves, rtol=1e-6)
    else:
        torch.testing.assert_close(whole, halves, rtol=1e-9, atol=1e-12)


def terms(config: MethodSettings, passes: int) -> torch.Tensor:
    """The terms of a step: their means over its passes."""
    method = build(config).double()
    for module in method.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    method.start_step(STEP)
    batch, found = a_batch(), []
    for tensors in (batch.views, batch.affines, batch.extras):
        tensors.update({key: value.double() for key, value in tensors.items()})
    for nth in range(passes):
        part = share(batch, nth, passes)
        if config.name != "mae":  # which draws its masks by row: let them be those of the whole batch
            part.offset = 0
        found.append(torch.stack(list(method(part).values())).detach())
    return torch.stack(found).mean(dim=0)
