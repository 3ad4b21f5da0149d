"""What DSA sees: two views of every image as its host's student represents them, and a frozen encoder's features.

Shape legend: B images of this rank, S side of a view, D width of a representation, I views, Da width of an auxiliary
feature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from pipeline.errors import UsageError
from stages.models.encoder import Encoder
from stages.models.heads import at_least_float32
from stages.pretrain.data.batch import Batch


class StudentViews:
    """Records the student's forward passes while the host computes its terms.

    Used as a context manager; outside of it nothing is recorded.

    Args:
        student: the module whose forward passes are recorded; its first argument is the pixels.
        names: of the views that show the image itself, not a neighbour.
        read: takes the representations (n, D) out of what the module returns.
    """

    def __init__(self, student: nn.Module, names: Sequence[str], read: Callable[[Any], Tensor]) -> None:
        self.student, self.names, self.read = student, names, read
        self.heard: list[tuple[Tensor, Tensor]] = []  # pixels and representations of each forward pass
        self.listening = False
        student.register_forward_hook(self._hear)

    def __enter__(self) -> None:
        self.heard, self.listening = [], True

    def __exit__(self, *error: object) -> None:
        self.heard, self.listening = [], False

    def _hear(self, module: nn.Module, given: tuple[Any, ...], found: Any) -> None:
        if self.listening:
            self.heard.append((given[0], self.read(found)))

    def two(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The first two views of every image that have the size of the first recorded view.

        If the student saw only one such view, the first other view of that size goes through the student here. This
        is the case for ReSSL (its weak view) and FLSL (its teacher crop).

        Returns:
            Representations z (2B, D), those of the images' first views before those of their second, and their pixels
            (2B, 3, S, S).

        Raises:
            UsageError: if the host's views include no second one of that size.
            ValueError: if the host never ran the student.
        """
        if not self.heard:
            raise ValueError("dsa heard no forward pass of the encoder while its host computed its terms")
        count, size = 2 * len(batch), self.heard[0][0].shape[-1]
        same = [(images, z) for images, z in self.heard if images.shape[-1] == size]
        images, z = torch.cat([part for part, _ in same])[:count], torch.cat([part for _, part in same])[:count]
        if len(z) == count:
            return z, images
        for view_B3SS in (view for name in self.names for view in batch.views[name]):
            if view_B3SS.shape == images.shape and not torch.equal(view_B3SS, images):
                return torch.cat([z, self.read(self.student(view_B3SS))]), torch.cat([images, view_B3SS])
        raise UsageError(
            f"dsa compares two views of an image, and its host makes one of {size} pixels: give it a second one "
            "(method.host.global_crops.count: 2)"
        )


class FrozenViews:
    """The frozen auxiliary encoder, which takes views that were normalised for the student."""

    def __init__(self, encoder: Encoder, mean: Sequence[float], std: Sequence[float]) -> None:
        self.encoder = encoder.eval().requires_grad_(False)
        self.mean, self.std = mean, std

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(I, Da) unit vectors; the views are first brought to the auxiliary encoder's image size and normalisation."""

        def column(values: Sequence[float]) -> Tensor:
            return images.new_tensor(values)[:, None, None]

        pixels = images * column(self.std) + column(self.mean)
        side = self.encoder.image_size
        if pixels.shape[-1] != side:
            pixels = functional.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
        vectors = self.encoder((pixels - column(self.encoder.mean)) / column(self.encoder.std)).vector
        return functional.normalize(at_least_float32(vectors), dim=1)
