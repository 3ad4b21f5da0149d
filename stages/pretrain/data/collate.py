"""Samples to chunks (in loader processes, uint8), and chunks to a Batch (on the rank: stacked, rendered, normalised).

Shape legend: V views of one kind, b images of a chunk, B of a rank's batch, S side of a view in pixels. Views of a
neighbour have rows for the images with a neighbour only (batch.py), fewer than b or B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.pretrain.data.batch import Batch
from stages.pretrain.data.samples import Sample, Skip
from stages.pretrain.views import render_gpu
from stages.pretrain.views.plan import Draw


@dataclass
class Chunk:
    """Consecutive rows of a global batch, as one loader process sends them at once.

    Either `views` holds the rendered views, or `pixels`, `reduced` and `draws` what a GPU needs to render them.
    """

    step: int
    image_ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # (b,)
    source: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # (b,)
    neighbor_ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # (b,)
    affines: dict[str, Tensor] = field(default_factory=dict)  # name -> (V, b, 2, 3)
    labels: dict[str, Tensor] = field(default_factory=dict)  # name -> (V, b, S, S) int32
    extras: dict[str, Tensor] = field(default_factory=dict)  # name -> (b, ...)
    views: dict[str, Tensor] = field(default_factory=dict)  # name -> (V, b, S, S, 3) uint8
    pixels: list[Tensor] = field(default_factory=list)  # decoded images, neighbours included, (h, w, 3) uint8
    reduced: list[int] = field(default_factory=list)  # of each: it was decoded at 1/reduced of its size
    sizes: dict[str, int] = field(default_factory=dict)  # name -> S
    draws: list[list[tuple[Draw, int]]] = field(default_factory=list)  # of each row: draw, which of `pixels` it cuts
    skipped: list[Skip] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.image_ids)

    def pin_memory(self) -> Chunk:
        """The same in page-locked memory, from which copies to a GPU are fast; DataLoader's pinning thread calls it."""

        def pin(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.pin_memory()
            if isinstance(value, dict):
                return {name: pin(item) for name, item in value.items()}
            if isinstance(value, list) and value and isinstance(value[0], Tensor):
                return [pin(item) for item in value]
            return value

        return replace(self, **{f.name: pin(getattr(self, f.name)) for f in fields(self)})


def collate(step: int, samples: Sequence[Sample]) -> Chunk:
    """The samples of consecutive rows as one chunk.

    Raises:
        ValueError: when a drawer gave the images of a batch different numbers or shapes of something.
    """
    chunk = Chunk(
        step,
        torch.tensor([s.image_id for s in samples]),
        torch.tensor([s.source for s in samples]),
        torch.tensor([s.neighbor_id for s in samples]),
        _join(samples, lambda s: s.affines, 1),
        _join(samples, lambda s: s.labels, 1),
        _join(samples, lambda s: {name: extra[None] for name, extra in s.extras.items()}, 0),
        _join(samples, lambda s: s.views, 1),
        sizes=samples[0].sizes,
        skipped=[skip for s in samples for skip in s.skipped],
    )
    for sample in samples:
        chunk.draws.append([(item, len(chunk.pixels) + image) for item, image in sample.draws])
        chunk.pixels += [torch.from_numpy(np.require(pixels, requirements=["C", "W"])) for pixels in sample.pixels]
        chunk.reduced += sample.reduced if sample.pixels else []
    return chunk


def _join(samples: Sequence[Sample], get: Callable[[Sample], dict[str, Any]], axis: int) -> dict[str, Tensor]:
    """Arrays of the samples, by name, one after the other along an axis: that of the images."""
    joined = {}
    for name in get(samples[0]):
        arrays = [get(sample).get(name) for sample in samples]
        shapes = sorted({"missing" if a is None else str((*a.shape[:axis], *a.shape[axis + 1 :])) for a in arrays})
        if len(shapes) > 1:
            raise ValueError(
                f"the method's drawer gives {name!r} in different shapes within a batch ({', '.join(shapes)}): "
                "every image needs the same number of views, and extras of one shape"
            )
        joined[name] = torch.from_numpy(np.concatenate(arrays, axis))  # type: ignore[arg-type]
    return joined


# ------------------------------------------------------------------------------------------------------- the batch
def assemble_batch(chunks: Sequence[Chunk], device: torch.device, mean: Sequence[float], std: Sequence[float]) -> Batch:
    """A rank's batch, its views normalised: (value / 255 - mean) / std.

    Args:
        chunks: all rows of the batch, in order.
        device: where the batch goes; views that are not rendered yet are rendered there.
        mean: of red, green, blue on the [0, 1] scale.
        std: likewise.
    """
    scale = torch.tensor([1 / (255 * s) for s in std], device=device)[:, None, None]
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)[:, None, None]
    affines = _concatenate([chunk.affines for chunk in chunks], 1, device)
    rendered = chunks[0].views or not chunks[0].pixels
    if rendered:
        views = _join_views(chunks, device)
    else:
        views = {name: render_views(chunks, name, affine.shape[0], device) for name, affine in affines.items()}
    neighbor_ids = _cat([chunk.neighbor_ids for chunk in chunks], 0, device)
    return Batch(
        image_ids=_cat([chunk.image_ids for chunk in chunks], 0, device),
        source=_cat([chunk.source for chunk in chunks], 0, device),
        views={name: view.mul_(scale).add_(shift) for name, view in views.items()},
        affines=affines,
        labels={n: v.long() for n, v in _concatenate([chunk.labels for chunk in chunks], 1, device).items()},
        extras=_concatenate([chunk.extras for chunk in chunks], 0, device),
        neighbor_ids=neighbor_ids,
    )


def _join_views(chunks: Sequence[Chunk], device: torch.device) -> dict[str, Tensor]:
    """uint8 (V, b, S, S, 3) of every chunk -> float (V, B, 3, S, S) in [0, 255]; the copy converts."""
    views = {}
    for name, first in chunks[0].views.items():
        count, _, size = first.shape[:3]
        joined = torch.empty(count, sum(chunk.views[name].shape[1] for chunk in chunks), 3, size, size, device=device)
        at = 0
        for chunk in chunks:
            mine = chunk.views[name].to(device, non_blocking=True)
            joined[:, at : at + mine.shape[1]] = mine.permute(0, 1, 4, 2, 3)
            at += mine.shape[1]
        views[name] = joined
    return views


def render_views(chunks: Sequence[Chunk], name: str, count: int, device: torch.device) -> Tensor:
    """Render the views of one name, chunk by chunk.

    Args:
        chunks: all rows of the batch, in order, with decoded pixels.
        name: of the views.
        count: V, how many of them an image has.
        device: where they are rendered.

    Returns:
        (V, B, 3, S, S) float in [0, 255].
    """
    size = chunks[0].sizes[name]
    rows = [torch.empty(0, count, 3, size, size, device=device)]
    for chunk in chunks:
        flat = [(item, image) for draws in chunk.draws for item, image in draws if item.view == name]
        if not flat:  # no image of this chunk has a neighbour
            continue
        drawn = render_gpu.render(
            render_gpu.pad([image.to(device, non_blocking=True) for image in chunk.pixels]),
            [(image.shape[0], image.shape[1]) for image in chunk.pixels],
            [item for item, _ in flat],
            [image for _, image in flat],
            chunk.reduced,
        )
        rows.append(drawn.view(-1, count, *drawn.shape[1:]))
    return torch.cat(rows).transpose(0, 1).contiguous()


def _concatenate(named: Sequence[dict[str, Tensor]], axis: int, device: torch.device) -> dict[str, Tensor]:
    return {name: _cat([tensors[name] for tensors in named], axis, device) for name in named[0]}


def _cat(tensors: Sequence[Tensor], axis: int, device: torch.device) -> Tensor:
    return torch.cat([tensor.to(device, non_blocking=True) for tensor in tensors], axis)
