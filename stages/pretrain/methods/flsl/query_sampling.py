"""FLSL's "random pooling": chooses one token of every window of a crop as a query.

Source: docs/methods.md#flsl-query-sampling.

Shape legend: B images of this rank, Q queries of a crop = windows of its grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.pretrain.data.batch import Batch


def window_queries(grid: int, window: int, cell_BQ: Tensor, corner_B: Tensor) -> Tensor:
    """One token of each window of a square map.

    Args:
        grid: tokens on a side of the map.
        window: tokens on a side of a window; Q = (grid // window)^2 windows, row by row.
        cell_BQ: which token of the window, from 0 (top left) to window^2 - 1, row by row.
        corner_B: the corner of the map that the windows start from, if they do not fill it: 0 top left, 1 top right, 2
            bottom left, 3 bottom right.

    Returns:
        (B, Q) int64, indices of tokens of the map, row by row.
    """
    side, rest = grid // window, grid % window
    place_Q = torch.arange(side * side, device=cell_BQ.device)
    down_B1, right_B1 = corner_B[:, None] // 2 * rest, corner_B[:, None] % 2 * rest
    row_BQ = down_B1 + place_Q // side * window + cell_BQ // window
    column_BQ = right_B1 + place_Q % side * window + cell_BQ % window
    return row_BQ * grid + column_BQ


def sample_queries(batch: Batch, crops: Sequence[tuple[int, int]], *, random: bool) -> list[Tensor]:
    """Draws the query tokens of every crop.

    The draws of an image depend on the step's seed and on its row in the global batch, not on the number of ranks.

    Args:
        batch: one rank's rows of the global batch.
        crops: for each crop, the tokens on a side of its map and of a window.
        random: take a random token of every window; False: its top left one.

    Returns:
        (B, Q) int64 for each crop, on the batch's device.
    """
    counts = [(grid // window) ** 2 for grid, window in crops]
    # Numbers are drawn for every row of the global batch up to this rank's last; those of earlier ranks are skipped.
    rows = torch.rand(batch.offset + len(batch), sum(counts) + len(counts), generator=batch.generator())
    draws = rows[batch.offset :].to(batch.image_ids.device)
    queries = []
    for (grid, window), draw in zip(crops, torch.split(draws, [count + 1 for count in counts], dim=1), strict=True):
        corner_B = (draw[:, 0] * 4).long()
        cell_BQ = (draw[:, 1:] * window**2).long() if random else torch.zeros_like(draw[:, 1:], dtype=torch.long)
        queries.append(window_queries(grid, window, cell_BQ, corner_B))
    return queries
