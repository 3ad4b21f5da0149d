"""Labelled images to batches: read and cut in loader processes, put together and normalised on the rank.

What an image becomes depends on the seed and on its slot (stages/training/sampler.py) alone. An image that cannot be
used is replaced by another, and the reason is kept.

Shape legend: B images of this rank, H W sides of the batch's images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import SourceError
from stages.data.images import ImageError, decode
from stages.finetune.data.placement import Pixels
from stages.training.loader import Share, read_batches
from stages.training.sampler import Sampler, Slot, generator

MAX_TRIES = 100  # images tried for one row of a batch before training stops
ATTEMPT = 1 << 20  # added to an image's stream for each image that was tried in its slot before
REPLACEMENT = 1 << 62  # the stream of the order in which other images are tried
WATCHED = 16  # images whose features are watched


class Rows(Protocol):
    """What is used of `stages.data.tables.Table`."""

    def row(self, image_id: int) -> dict[str, Any]:
        """An image's row, by column."""


@dataclass
class Example:
    """One training image with what is learnt from it."""

    pixels: Pixels  # (H, W, 3)
    targets: dict[str, NDArray[Any]]


class Prepare(Protocol):
    """Makes an example of a row; it pickles."""

    def __call__(self, row: dict[str, Any], pixels: Pixels, rng: np.random.Generator) -> Example:
        """The image cut and its targets with it. Raises ImageError where it cannot be learnt from."""


@dataclass
class ExampleChunk:
    """Consecutive rows of a global batch, as one loader process sends them."""

    image_ids: list[int] = field(default_factory=list)
    pixels: list[Tensor] = field(default_factory=list)  # (H, W, 3) uint8 each
    targets: list[dict[str, Tensor]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # key, reason

    def __len__(self) -> int:
        return len(self.image_ids)


@dataclass
class LabelledBatch:
    """One rank's share of a forward pass."""

    image_ids: Tensor  # (B,) int64
    images: Tensor  # (B, 3, H, W) normalised; smaller images lie at the top left, 0 around them
    sizes: list[tuple[int, int]]  # height and width of each image
    targets: list[dict[str, Tensor]]
    skipped: dict[str, int] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.image_ids)

    def to(self, device: torch.device | str) -> LabelledBatch:
        """The same batch with all its tensors on a device."""
        targets = [{name: value.to(device) for name, value in one.items()} for one in self.targets]
        return replace(self, image_ids=self.image_ids.to(device), images=self.images.to(device), targets=targets)

    def watched_images(self) -> Tensor:
        """(B', 3, H, W): the first images."""
        return self.images[:WATCHED]

    def stacked(self, name: str) -> Tensor:
        """One target of all images, (B, ...), where they are of one shape."""
        return torch.stack([one[name] for one in self.targets])


class ExampleChunks:
    """What a loader process computes.

    Args:
        rows: of the images.
        ids: of the images to learn from.
        prepare: makes their examples.
        sampler: of one source with that many images.
        seed: of every random choice, together with the slot.
    """

    def __init__(self, rows: Rows, ids: Sequence[int], prepare: Prepare, sampler: Sampler, seed: int) -> None:
        self.rows, self.ids, self.prepare, self.sampler, self.seed = rows, list(ids), prepare, sampler, seed

    def make(self, step: int, start: int, stop: int) -> ExampleChunk:
        """Rows start .. stop-1 of a step's global batch."""
        chunk = ExampleChunk()
        for slot in self.sampler.slots(step, start, stop):
            image_id, example = self._example(slot, chunk.skipped)
            chunk.image_ids.append(image_id)
            chunk.pixels.append(torch.from_numpy(example.pixels))
            chunk.targets.append({name: torch.from_numpy(value) for name, value in example.targets.items()})
        return chunk

    def _example(self, slot: Slot, skipped: list[tuple[str, str]]) -> tuple[int, Example]:
        """The slot's image, or another where that one cannot be used."""
        for attempt, image_id in enumerate(self._candidates(slot)):
            row = self.rows.row(image_id)
            rng = generator(self.seed, slot.epoch, 0, image_id, slot.repeat + attempt * ATTEMPT)
            try:
                return image_id, self.prepare(row, decode(row["image"]), rng)
            except ImageError as error:
                skipped.append((str(row["key"]), str(error)))
        raise SourceError(
            f"images: none of the {min(len(self.ids), MAX_TRIES)} images tried can be learnt from; the last, "
            f"{skipped[-1][0]}: {skipped[-1][1]}"
        )

    def _candidates(self, slot: Slot) -> Iterator[int]:
        yield self.ids[slot.index]
        rng = generator(self.seed, slot.epoch, 0, self.ids[slot.index], slot.repeat + REPLACEMENT)
        others = rng.permutation(len(self.ids))[: MAX_TRIES - 1]
        yield from (self.ids[i] for i in others if i != slot.index)


class LabelledData:
    """The batches of one rank.

    Args:
        chunks: makes rows of them.
        share: which rows this rank gets.
        mean: of red, green, blue on the [0, 1] scale, which the encoder expects to be taken off.
        std: likewise, which the encoder expects its input to be divided by.
        multiple: sides of a batch's images are enlarged to a multiple of this.
        device: where the images end up; they travel as uint8.
    """

    def __init__(
        self,
        chunks: ExampleChunks,
        share: Share,
        mean: Sequence[float],
        std: Sequence[float],
        multiple: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.chunks, self.share, self.mean, self.std = chunks, share, mean, std
        self.multiple, self.device = multiple, device

    def batches(self, start: int, stop: int) -> Iterator[LabelledBatch]:
        """This rank's share of the forward passes start .. stop-1.

        Raises:
            SourceError: when no image can be used.
            ClusterError: when a loader process dies.
        """
        for chunks in read_batches(self.chunks, self.share, start, stop):
            pixels = [one for chunk in chunks for one in chunk.pixels]
            batch = LabelledBatch(
                torch.tensor([one for chunk in chunks for one in chunk.image_ids]),
                normalised(pixels, self.mean, self.std, self.multiple, self.device),
                [(one.shape[0], one.shape[1]) for one in pixels],
                [one for chunk in chunks for one in chunk.targets],
            )
            for key, reason in (one for chunk in chunks for one in chunk.skipped):
                batch.skipped["unusable image"] = batch.skipped.get("unusable image", 0) + 1
                batch.problems[key] = reason
            yield batch


def normalised(
    pixels: Sequence[Tensor], mean: Sequence[float], std: Sequence[float], multiple: int = 1, device: Any = "cpu"
) -> Tensor:
    """Images as an encoder takes them, (B, 3, H, W), each at the top left; 0 where an image has no pixels.

    Args:
        pixels: (H, W, 3) uint8 each.
        mean: see `LabelledData`.
        std: likewise.
        multiple: H and W are multiples of this.
        device: where they go.
    """
    height, width = (-(-max(one.shape[axis] for one in pixels) // multiple) * multiple for axis in (0, 1))
    scale = torch.tensor([1 / (255 * s) for s in std], device=device)[:, None, None]
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)[:, None, None]
    images = torch.zeros(len(pixels), 3, height, width, device=device)
    for image, one in zip(images, pixels, strict=True):
        image[:, : one.shape[0], : one.shape[1]] = one.to(device).permute(2, 0, 1) * scale + shift
    return images
