"""CoTAP's object-aware filter: prototype cross-attention on a feature map.

Source: docs/methods.md#cotap-object-aware-filter (Eq. 17 to 19).

Shape legend: B images, C width of the map, E attention width (D' in the paper), h w grid, M prototypes, H heads.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as functional
from torch import Tensor, nn


class ObjectAwareFilter(nn.Module):
    """Prototypes of 3 x 3 cells slide over a map as convolution kernels; each cell attends over the prototypes.

    `post` appends the attended values to the map: (B, C, h, w) -> (B, C + E, h, w). `pre_last` fuses both back to C
    channels, to be added to the residual stream before a ViT's last block.

    Args:
        width: C.
        prototypes: M.
        heads: channels are split among them; 1 is the paper's literal single-head form.
        attention_width: E; default C.
        kernel: side of a prototype in cells, odd.
        out_projection: a linear layer on the attended values.
        placement: where an Encoder puts it.

    Raises: ValueError if the heads do not divide E, or the kernel is even.
    """

    def __init__(
        self,
        width: int,
        prototypes: int = 64,
        heads: int = 1,
        attention_width: int | None = None,
        kernel: int = 3,
        out_projection: bool = True,
        placement: Literal["post", "pre_last"] = "post",
    ) -> None:
        super().__init__()
        inner = attention_width or width
        if inner % heads:
            raise ValueError(f"{heads} heads do not divide an attention width of {inner}: choose heads that do")
        if kernel % 2 == 0:
            raise ValueError(f"kernel is {kernel}, but a prototype is centred on a cell: choose an odd number")
        self.width, self.heads, self.kernel, self.attention_width = width, heads, kernel, inner
        self.placement: Literal["post", "pre_last"] = placement
        self.prototypes = nn.Parameter(torch.randn(prototypes, kernel, kernel, width) * 0.02)
        self.query = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, inner, bias=False)
        self.out = nn.Linear(inner, inner) if out_projection else None
        self.fuse = nn.Linear(width + inner, width) if placement == "pre_last" else None
        for layer in (self.query, self.key, self.value, self.out, self.fuse):
            if layer is not None:
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    @property
    def extra_width(self) -> int:
        """Channels that `forward` adds to the map."""
        return self.attention_width if self.placement == "post" else 0

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-able."""
        return {
            "width": self.width,
            "prototypes": len(self.prototypes),
            "heads": self.heads,
            "attention_width": self.attention_width,
            "kernel": self.kernel,
            "out_projection": self.out is not None,
            "placement": self.placement,
        }

    def scores(self, map_BChw: Tensor) -> Tensor:
        """mu: cross-correlation of queries with the prototypes' keys, zero padded: (B, H, h*w, M) (Eq. 18).

        The paper prints U_q and h_k but defines h_q and U_k only: keys of the prototypes slide over patch queries.
        """
        per_head = self.attention_width // self.heads
        query_BEhw = functional.conv2d(map_BChw, self.query.weight[:, :, None, None])
        # (M, k, k, E) -> H groups of M kernels with E/H channels each.
        kernels = self.key(self.prototypes).permute(0, 3, 1, 2)
        kernels = kernels.unflatten(1, (self.heads, per_head)).transpose(0, 1).flatten(0, 1)
        mu = functional.conv2d(query_BEhw, kernels.to(query_BEhw.dtype), padding=self.kernel // 2, groups=self.heads)
        return mu.reshape(len(mu), self.heads, len(self.prototypes), -1).transpose(2, 3)

    def attend(self, map_BChw: Tensor) -> Tensor:
        """softmax(mu / sqrt(E / H)) times the prototypes' mean values, before any out-projection: (B, E, h, w)."""
        per_head = self.attention_width // self.heads
        attention_BHNM = (self.scores(map_BChw) / per_head**0.5).softmax(dim=-1)
        value_ME = self.value(self.prototypes).mean(dim=(1, 2))
        value_HMe = value_ME.unflatten(1, (self.heads, per_head)).transpose(0, 1)
        attended_BHNe = attention_BHNM @ value_HMe.to(attention_BHNM.dtype)
        return attended_BHNe.transpose(2, 3).flatten(1, 2).reshape(len(map_BChw), -1, *map_BChw.shape[2:])

    def forward(self, map_BChw: Tensor) -> Tensor:
        """h_o of Eq. 19 (`post`, (B, C + E, h, w)), or what joins the residual stream (`pre_last`, (B, C, h, w))."""
        attended_BEhw = self.attend(map_BChw)
        if self.out is not None:
            attended_BEhw = _per_cell(self.out, attended_BEhw)
        joined = torch.cat([map_BChw, attended_BEhw.to(map_BChw.dtype)], dim=1)
        return joined if self.fuse is None else _per_cell(self.fuse, joined)

    def pooled(self, map_BChw: Tensor) -> Tensor:
        """F_down: a map pooled to the prototypes' grid, k x k cells, and flattened in their order, (B, k*k*C)."""
        return functional.adaptive_avg_pool2d(map_BChw, self.kernel).permute(0, 2, 3, 1).flatten(1)


def _per_cell(layer: nn.Linear, map_BChw: Tensor) -> Tensor:
    return functional.conv2d(map_BChw, layer.weight[:, :, None, None], layer.bias)
