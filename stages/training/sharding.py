"""FSDP2: parameters, gradients and optimiser state split among the ranks, in place of a whole copy on each.

Every member of a list called `blocks` (a ViT's) is gathered while it runs; all other parameters are gathered for the
whole step. Checkpoints hold whole tensors, the same as without, so that a training may go on under another strategy or
number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from stages.training.collectives import rank, world_size
from stages.training.optim import build_optimizer
from stages.training.settings import OptimizerSettings


class Sharded(nn.Module):
    """What the loop calls in place of the method: in every step each trained parameter gets a gradient on all ranks.

    The ranks add gradients up in groups, and a rank that has none for a parameter (a term that has nothing to say about
    its images) would send another number of values than the rest.
    """

    def __init__(self, method: nn.Module) -> None:
        super().__init__()
        self.method = method

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """The method's terms."""
        terms: dict[str, Tensor] = self.method(batch)
        name = next(iter(terms))
        gathered = [p for p in self.method.parameters() if p.requires_grad and not isinstance(p, DTensor)]
        return {**terms, name: terms[name] + sum((p.flatten()[0] for p in gathered), torch.zeros(())) * 0}


def shard(
    method: nn.Module, optimizer: torch.optim.Optimizer, settings: OptimizerSettings, device: torch.device
) -> tuple[Sharded, torch.optim.Optimizer]:
    """Split a method and the state of its optimiser, both of which every rank holds as a whole.

    Args:
        method: its parameters are replaced.
        optimizer: of the whole parameters; it is of no use afterwards.
        settings: of the optimiser.
        device: where the shards go.

    Returns:
        What the loop calls, and an optimiser of the shards with the state of the other.
    """
    mesh = init_device_mesh(device.type, (world_size(),))
    names: dict[Any, str] = {parameter: name for name, parameter in method.named_parameters()}
    for name, module in method.named_modules():
        if name.rpartition(".")[2] == "blocks":
            for block in module.children():
                fully_shard(block, mesh=mesh)
    # Methods use parameters outside their modules' forward passes (prototypes, say): these stay gathered in a step.
    fully_shard(method, mesh=mesh, reshard_after_forward=False)
    method.to(device)  # buffers
    shards = dict(method.named_parameters())
    split = build_optimizer(method, settings)
    for parameter, values in optimizer.state.items():
        one = shards[names[parameter]]
        assert isinstance(one, DTensor)
        split.state[one] = {
            key: distribute_tensor(value.to(device), mesh, one.placements)
            if isinstance(value, Tensor) and value.shape == one.shape and value.ndim
            else value
            for key, value in values.items()
        }
    return Sharded(method), split


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """While the body runs, modules inside may be called by themselves, not only through the whole."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def whole(values: Any) -> Any:
    """The same nested dicts and lists with whole tensors on the CPU in place of shards.

    Every rank calls it. Only rank 0 keeps the tensors: the others get None for each, so that a node's memory need not
    hold the whole once for every rank.
    """
    if isinstance(values, DTensor):
        tensor = values.full_tensor()
        return tensor.cpu() if rank() == 0 else None
    if isinstance(values, dict):
        return {key: whole(value) for key, value in values.items()}
    if isinstance(values, list):
        return [whole(value) for value in values]
    return values
