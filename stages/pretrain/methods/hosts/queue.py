"""A first-in, first-out queue of unit vectors from earlier batches, for MoCo, ReSSL and SwAV.

Shape legend: Q entries, D width, B rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from stages.models.heads import at_least_float32
from stages.training.collectives import gather


class Queue(nn.Module):
    """A queue that is the same on every rank and part of a checkpoint. It starts with random unit vectors.

    It can replace lightly's memory bank, which checkpoints do not hold.
    """

    rows: Tensor  # (Q, D)
    position: Tensor  # () row for the next vector

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", functional.normalize(torch.randn(size, width), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    def forward(self, output: Tensor, labels: Tensor | None = None, update: bool = False) -> tuple[Tensor, Tensor]:
        """The interface of lightly's memory bank: the output, and the entries as (D, Q). The queue does not change."""
        return output, self.rows.T

    @torch.no_grad()
    def push(self, rows_BD: Tensor) -> None:
        """Replaces the oldest entries by the rows of all ranks; of more rows than entries, the last ones are kept."""
        size = len(self.rows)
        newest = functional.normalize(at_least_float32(gather(rows_BD)), dim=1)[-size:]
        where = (self.position + torch.arange(len(newest), device=newest.device)) % size
        self.rows[where] = newest.to(self.rows.dtype)
        self.position.copy_((self.position + len(newest)) % size)
