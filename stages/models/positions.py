"""Position tables of ViTs: the fixed 2-D sin-cos table, and interpolation to another grid.

Shape legend: N tokens = h*w in raster order, P prefix tokens ([CLS], registers), D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_table(width: int, grid: tuple[int, int], prefix: int = 0) -> Tensor:
    """The fixed position table of MAE and FLSL.

    Source: docs/methods.md#vit-positions.

    The first half of the channels encodes the column, the second the row, each as [sin(p w_k), cos(p w_k)]
    with w_k = 10000^(-k/(width/4)).

    Raises: ValueError if `width` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"a 2-D sin-cos table needs a width that is a multiple of 4, not {width}")
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows, columns = torch.meshgrid(
        torch.arange(grid[0], dtype=torch.float64), torch.arange(grid[1], dtype=torch.float64), indexing="ij"
    )

    def encode(position: Tensor) -> Tensor:
        angle = position.reshape(-1, 1) * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    table_ND = torch.cat([encode(columns), encode(rows)], dim=1)
    return torch.cat([table_ND.new_zeros(prefix, width), table_ND])


def interpolate_plus_tenth(table_1ND: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int) -> Tensor:
    """The DINO family's interpolation: bicubic by the factor (new + 0.1) / old, which differs slightly from timm's.

    Args:
        table_1ND: (1, P + h*w, D), for the grid `old`.
        old: (h, w).
        new: (h', w').
        prefix: P, the rows that stay as they are.

    Returns: (1, P + h'*w', D).
    """
    if old == new:
        return table_1ND
    head, grid_1ND = table_1ND[:, :prefix], table_1ND[:, prefix:]
    map_1Dhw = grid_1ND.reshape(1, *old, -1).permute(0, 3, 1, 2).float()
    factors = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
    map_1Dhw = F.interpolate(map_1Dhw, scale_factor=factors, mode="bicubic")
    resized = map_1Dhw.permute(0, 2, 3, 1).flatten(1, 2).to(table_1ND.dtype)
    return torch.cat([head, resized], dim=1)
