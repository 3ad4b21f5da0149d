"""What a method's `compute_terms` gets: the views of B images, stacked, with the geometry that made them.

Shape legend: V views of one kind, B images of this rank, S side of a view in pixels.

A view of a neighbour has a row for each image that has a neighbour only, `neighbor_ids >= 0`, in their order: nothing
stands in for a neighbour that is not there.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass
class Batch:
    """One rank's share of a forward pass: rank r holds rows [r*B, (r+1)*B) of the global batch, in order."""

    image_ids: Tensor  # (B,) int64
    source: Tensor  # (B,) int64: which of the mixed image sources the image came from, 0 if there is only one
    views: dict[str, Tensor]  # name -> (V, B, 3, S, S) float, normalised
    affines: dict[str, Tensor]  # name -> (V, B, 2, 3) float32: view pixels -> stored-image pixels
    labels: dict[str, Tensor] = field(default_factory=dict)  # name -> (V, B, S, S) int64, -1 outside
    extras: dict[str, Tensor] = field(default_factory=dict)  # (B, ...): the drawer's own arrays, and "embedding"
    neighbor_ids: Tensor | None = None  # (B,) int64: the image behind views of="neighbor"; -1 where none
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> images replaced while this batch was made
    problems: dict[str, str] = field(default_factory=dict)  # key -> reason, of those images
    seed: int = 0  # of this forward pass, equal on all ranks: for random choices inside compute_terms
    offset: int = 0  # index of this rank's first row in the global batch

    def __len__(self) -> int:
        return len(self.image_ids)

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Batch:
        """The same batch with all its tensors on a device."""

        def move(value: Tensor) -> Tensor:
            return value.to(device, non_blocking=non_blocking)

        return replace(
            self,
            image_ids=move(self.image_ids),
            source=move(self.source),
            views={name: move(view) for name, view in self.views.items()},
            affines={name: move(affine) for name, affine in self.affines.items()},
            labels={name: move(label) for name, label in self.labels.items()},
            extras={name: move(extra) for name, extra in self.extras.items()},
            neighbor_ids=None if self.neighbor_ids is None else move(self.neighbor_ids),
        )

    def first(self, count: int) -> Batch:
        """The first `count` images, with those neighbours that they have, on the same device."""
        neighbors = 0 if self.neighbor_ids is None else int((self.neighbor_ids[:count] >= 0).sum())

        def cut(views: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: view[:, : count if view.shape[1] == len(self) else neighbors] for name, view in views.items()}

        return replace(
            self,
            image_ids=self.image_ids[:count],
            source=self.source[:count],
            views=cut(self.views),
            affines=cut(self.affines),
            labels={name: label[:, :count] for name, label in self.labels.items()},
            extras={name: extra[:count] for name, extra in self.extras.items()},
            neighbor_ids=None if self.neighbor_ids is None else self.neighbor_ids[:count],
        )

    def watched_images(self) -> Tensor:
        """(B, 3, S, S): the first view, whose features are watched for collapse."""
        return next(iter(self.views.values()))[0]

    def generator(self, image_id: int | None = None) -> torch.Generator:
        """A CPU generator for this forward pass, or for one image in it: the same whatever the number of ranks."""
        generator = torch.Generator()
        generator.manual_seed(self.seed if image_id is None else (self.seed * 1_000_003 + image_id) % (2**63 - 1))
        return generator
