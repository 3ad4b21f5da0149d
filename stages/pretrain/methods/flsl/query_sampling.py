"""FLSL's "random pooling": which tokens of a crop become queries, one a window (docs/methods.md#flsl-query-sampling).

Shape legend: B images of this rank, Q queries of a crop = windows of its grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.pretrain.data.batch import Batch


def window_queries(grid: int, window: int, cell_BQ: Tensor, corner_B: Tensor) -> Tensor:
    """The raster index of one token in each window of a grid x grid map: (B, Q), Q = (grid // window)^2, row by row.

    Args:
        cell_BQ: which token of a window, 0 (its top left) .. window^2 - 1, in raster order.
        corner_B: where the windows are anchored if they do not fill the grid: 0 top left, 1 top right, 2 bottom left,
            3 bottom right.
    """
    side, rest = grid // window, grid % window
    place_Q = torch.arange(side * side, device=cell_BQ.device)
    down_B1, right_B1 = corner_B[:, None] // 2 * rest, corner_B[:, None] % 2 * rest
    row_BQ = down_B1 + place_Q // side * window + cell_BQ // window
    column_BQ = right_B1 + place_Q % side * window + cell_BQ % window
    return row_BQ * grid + column_BQ


def sample_queries(batch: Batch, crops: Sequence[tuple[int, int]], *, random: bool) -> list[Tensor]:
    """Query tokens of every crop, (B, Q) each, on the batch's device.

    The draws of an image follow from the step's seed and its row in the global batch, whatever the number of ranks.

    Args:
        crops: (side of the feature map, window) of each crop.
        random: a random token of every window; else its top left one.
    """
    counts = [(grid // window) ** 2 for grid, window in crops]
    # Row by row from the first row of the global batch on: ranks that start later skip what the ones before them use.
    rows = torch.rand(batch.offset + len(batch), sum(counts) + len(counts), generator=batch.generator())
    draws = rows[batch.offset :].to(batch.image_ids.device)
    queries = []
    for (grid, window), draw in zip(crops, torch.split(draws, [count + 1 for count in counts], dim=1), strict=True):
        corner_B = (draw[:, 0] * 4).long()
        cell_BQ = (draw[:, 1:] * window**2).long() if random else torch.zeros_like(draw[:, 1:], dtype=torch.long)
        queries.append(window_queries(grid, window, cell_BQ, corner_B))
    return queries
