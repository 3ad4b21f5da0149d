"""Projection heads: encoder features -> unit embeddings -> scores against prototypes.

Source: docs/methods.md#projection-head.

Shape legend: ... any leading axes, C input width, D embedding width, K prototypes.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as functional
from torch import Tensor, nn


def at_least_float32(value: Tensor) -> Tensor:
    """Half precision as float32, wider types as they are: for where autocast's rounding would change a loss."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


class ProjectionHead(nn.Module):
    """An MLP with GELU, l2 normalisation, then cosines with K prototypes.

    Defaults are DINO's head: C -> 2048 -> 2048 -> 256 -> K, prototypes as a weight-normalised linear layer without
    bias. CoTAP's and Leopart's heads are the same with other K.

    Args:
        width: C, of the features that come in.
        prototypes: K; 0 for embeddings only (the scores are then the embeddings themselves).
        hidden: width of the MLP's hidden layers.
        bottleneck: D.
        layers: linear layers of the MLP.
        fixed_gain: prototypes have length 1 (DINO's `norm_last_layer`); else each has a learnable length.

    Example: `ProjectionHead(384, 65536)(torch.randn(8, 384)).shape` is (8, 65536).
    """

    def __init__(
        self,
        width: int,
        prototypes: int,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        fixed_gain: bool = True,
    ) -> None:
        super().__init__()
        widths = [width] + [hidden] * (layers - 1) + [bottleneck]
        parts: list[nn.Module] = []
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            parts += [nn.GELU()] if i else []
            parts.append(nn.Linear(fan_in, fan_out))
        self.mlp = nn.Sequential(*parts)
        for part in self.mlp:
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck)) if prototypes else None
        if self.prototypes is not None:
            nn.init.kaiming_uniform_(self.prototypes, a=5**0.5)  # nn.Linear's own initialisation
            self.renormalise()
        self.gain = nn.Parameter(torch.ones(prototypes)) if prototypes and not fixed_gain else None

    def embed(self, features_C: Tensor) -> Tensor:
        """(..., C) -> unit embeddings (..., D), in float32 or wider also under autocast."""
        embeddings_D: Tensor = self.mlp(features_C)
        return functional.normalize(at_least_float32(embeddings_D), dim=-1)

    def score(self, embeddings_D: Tensor) -> Tensor:
        """Unit embeddings (..., D) -> cosines with the prototypes, times their gain, (..., K)."""
        if self.prototypes is None:
            return embeddings_D
        unit_KD = functional.normalize(self.prototypes, dim=1)
        scores_K = at_least_float32(functional.linear(embeddings_D, unit_KD))
        return scores_K if self.gain is None else scores_K * self.gain

    def forward(self, features_C: Tensor) -> Tensor:
        """Features (..., C) -> scores (..., K)."""
        return self.score(self.embed(features_C))

    @torch.no_grad()
    def renormalise(self) -> None:
        """Scales the prototypes' rows back to length 1; that changes no score, only the effective learning rate."""
        if self.prototypes is not None:
            self.prototypes.copy_(functional.normalize(self.prototypes, dim=1))

    def drop_last_layer_gradients(self) -> None:
        """DINO's `freeze_last_layer`: prototypes and gains stay as they are in this step."""
        for parameter in (self.prototypes, self.gain):
            if parameter is not None:
                parameter.grad = None
