"""The fixed 2-D sin-cos position table of ViTs. How a table is fitted to another grid is in `feature_extractor.py`.

Shape legend: N tokens = h*w in raster order, D width.
"""

from __future__ import annotations

import torch
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
