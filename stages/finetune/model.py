"""What the fine-tuned models have in common: an encoder that is trained, and how fast each of its layers learns."""

from __future__ import annotations

from typing import Any, Literal, Self

from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stages.models.encoder import Encoder
from stages.training.contract import Step, Trainable

TRUNK = "trunk."  # how the names of the encoder's parameters begin


class FinetunedModel(Trainable):
    """An encoder, and in a subclass the head on it. What is not under `trunk` is the head.

    Args:
        encoder: where training starts from.
        layer_decay: learning rate of a layer over that of the layer above it.
        batch_norm: whether the encoder's batch norms are trained.
    """

    def __init__(self, encoder: Encoder, *, layer_decay: float, batch_norm: Literal["train", "freeze"]) -> None:
        super().__init__()
        self.trunk = encoder
        self.frozen_norms = batch_norm == "freeze"
        self._shares = layer_shares(encoder, layer_decay)
        self._undecayed = {f"model.{name}" for name in getattr(encoder.model, "no_weight_decay", set)()}
        if self.frozen_norms:
            for norm in self._norms():
                norm.requires_grad_(False)

    def encoder(self) -> Encoder:
        """The trained encoder."""
        return self.trunk

    def after_step(self, step: Step) -> None:
        """Nothing moves but what the optimiser moves."""
        return

    def share_of_lr(self, name: str) -> float:
        """Layer-wise decay: 1 for the head and an object-aware filter."""
        return self._shares.get(name.removeprefix(TRUNK), 1.0) if name.startswith(TRUNK) else 1.0

    def undecayed(self, name: str) -> bool:
        """What timm names: position tables and tokens."""
        return name.startswith(TRUNK) and name.removeprefix(TRUNK) in self._undecayed

    def train(self, mode: bool = True) -> Self:
        """Frozen batch norms stay in eval mode."""
        super().train(mode)
        if self.frozen_norms:
            for norm in self._norms():
                norm.eval()
        return self

    def head_state(self) -> dict[str, Any]:
        """The tensors of all but the encoder."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith(TRUNK)}

    def _norms(self) -> list[nn.Module]:
        return [module for module in self.trunk.modules() if isinstance(module, _BatchNorm)]


def layer_shares(encoder: Encoder, decay: float) -> dict[str, float]:
    """Share of the learning rate of each of the encoder's parameters, by name.

    Layers are timm's groups: a ViT's patch embedding is 0 and its blocks follow, a ResNet's stem is 0 and its residual
    blocks follow. The head, above the last of L layers, has 1, and layer i has decay^(L - i).
    """
    model: Any = encoder.model
    groups: dict[str, int] = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    above = max(groups.values()) + 1
    return {f"model.{name}": decay ** (above - group) for name, group in groups.items()}
