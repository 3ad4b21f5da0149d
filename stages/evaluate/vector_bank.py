"""Rows of numbers kept in a file, and the nearest of them searched block by block: memory does not grow with them.

Shape legend: N rows of the bank, D width, M queries, K neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stages.evaluate.weighted_knn import nearest

SIMILARITIES = 32_000_000  # in memory at once


class VectorBank:
    """Rows in float32, in the order in which they are appended.

    Args:
        path: of the file; it must not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.width = self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, rows_ND: Tensor) -> None:
        """Add rows at the end."""
        with self.path.open("ab") as file:
            file.write(rows_ND.to("cpu", torch.float32).contiguous().numpy().data)
        self._count, self.width = self._count + len(rows_ND), rows_ND.shape[1]

    def gather(self, rows_MK: Tensor) -> Tensor:
        """Some rows, (M, K, D)."""
        mapped = np.memmap(self.path, np.float32, "r", shape=(self._count, self.width))
        return torch.from_numpy(mapped[rows_MK.cpu().numpy()])

    def blocks(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """All rows in blocks: the number of the first one, and (size or fewer, D)."""
        with self.path.open("rb") as file:
            for start in range(0, self._count, size):
                count = min(size, self._count - start)
                rows = np.fromfile(file, np.float32, count * self.width)
                yield start, torch.from_numpy(rows.reshape(count, self.width))

    def nearest(self, queries_MD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Cosine similarities (M, K) and rows (M, K) of the k nearest, nearest first; ties in the order of the rows.

        Queries and rows must be L2-normalised. The search runs on the queries' device.

        Raises: ValueError if there are fewer than k rows.
        """
        if k > self._count:
            raise ValueError(f"k is {k}, but there are {self._count} vectors to choose from")
        best_MK = queries_MD.new_empty(len(queries_MD), 0)
        rows_MK = torch.empty(len(queries_MD), 0, dtype=torch.int64, device=queries_MD.device)
        for start, block in self.blocks(max(k, SIMILARITIES // max(1, len(queries_MD)))):
            found, rows = nearest(block.to(queries_MD.device), queries_MD, min(k, len(block)))
            # What is known already comes first and has lower rows, so that a stable sort keeps ties in their order.
            both = torch.cat([best_MK, found], dim=1)
            best_MK, order = both.sort(dim=1, descending=True, stable=True)
            best_MK, order = best_MK[:, :k], order[:, :k]
            rows_MK = torch.cat([rows_MK, rows + start], dim=1).gather(1, order)
        return best_MK, rows_MK
