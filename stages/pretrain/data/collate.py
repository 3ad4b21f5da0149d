"""Samples to parts (in the workers, uint8) and parts to a Batch (in the trainer: stacked, rendered, normalised).

Shape legend: V views of one kind, b images of a part, B of a batch, S side of a view.
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
class Part:
    """Consecutive rows of a batch, as a worker sends them."""

    step: int
    image_ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # (b,)
    source: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # (b,)
    neighbor_ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # (b,)
    affines: dict[str, Tensor] = field(default_factory=dict)  # name -> (V, b, 2, 3)
    labels: dict[str, Tensor] = field(default_factory=dict)  # name -> (V, b, S, S) int32
    extras: dict[str, Tensor] = field(default_factory=dict)  # name -> (b, ...)
    views: dict[str, Tensor] = field(default_factory=dict)  # name -> (V, b, S, S, 3) uint8; empty: see the next three
    pixels: list[Tensor] = field(default_factory=list)  # decoded images, neighbours included, (h, w, 3) uint8
    reduced: list[int] = field(default_factory=list)  # the scale each was decoded at
    sizes: dict[str, int] = field(default_factory=dict)  # name -> S
    draws: list[list[tuple[Draw, int]]] = field(default_factory=list)  # of each row: the draw and which of `pixels`
    skipped: list[Skip] = field(default_factory=list)
    failure: str = ""

    def __len__(self) -> int:
        return len(self.image_ids)

    def pin_memory(self) -> Part:
        """Called by the DataLoader's pinning thread."""

        def pin(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.pin_memory()
            if isinstance(value, dict):
                return {name: pin(item) for name, item in value.items()}
            if isinstance(value, list) and value and isinstance(value[0], Tensor):
                return [pin(item) for item in value]
            return value

        return replace(self, **{f.name: pin(getattr(self, f.name)) for f in fields(self)})


def collate(step: int, samples: Sequence[Sample]) -> Part:
    """Raises ValueError when a drawer gave the images of a batch different numbers or shapes of something."""
    part = Part(
        step,
        torch.tensor([s.image_id for s in samples]),
        torch.tensor([s.source for s in samples]),
        torch.tensor([s.neighbor_id for s in samples]),
        _stack(samples, lambda s: s.affines, 1),
        _stack(samples, lambda s: s.labels, 1),
        _stack(samples, lambda s: s.extras, 0),
        _stack(samples, lambda s: s.views, 1),
        sizes=samples[0].sizes,
        skipped=[skip for s in samples for skip in s.skipped],
    )
    for sample in samples:
        part.draws.append([(item, len(part.pixels) + of) for item, of in sample.draws])
        part.pixels += [torch.from_numpy(np.require(pixels, requirements=["C", "W"])) for pixels in sample.pixels]
        part.reduced += sample.reduced if sample.pixels else []
    return part


def _stack(samples: Sequence[Sample], get: Callable[[Sample], dict[str, Any]], axis: int) -> dict[str, Tensor]:
    stacked = {}
    for name in get(samples[0]):
        arrays = [get(sample).get(name) for sample in samples]
        shapes = sorted({"missing" if a is None else str(np.shape(a)) for a in arrays})
        if len(shapes) > 1:
            raise ValueError(
                f"the method's drawer gives {name!r} in different shapes within a batch ({', '.join(shapes)}): "
                "every image needs the same number of views, and extras of one shape"
            )
        stacked[name] = torch.from_numpy(np.stack(arrays, axis))  # type: ignore[arg-type]
    return stacked


# ------------------------------------------------------------------------------------------------------- the batch
def assemble_batch(parts: Sequence[Part], device: torch.device, mean: Sequence[float], std: Sequence[float]) -> Batch:
    """One Batch on `device`, views normalised: (value / 255 - mean) / std."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=device)[:, None, None]
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)[:, None, None]
    affines = _concatenate([part.affines for part in parts], 1, device)
    rendered = parts[0].views or not parts[0].pixels
    if rendered:
        views = _join_views(parts, device)
    else:
        views = {name: render_views(parts, name, affine.shape[0], device) for name, affine in affines.items()}
    neighbor_ids = _cat([part.neighbor_ids for part in parts], 0, device)
    return Batch(
        image_ids=_cat([part.image_ids for part in parts], 0, device),
        source=_cat([part.source for part in parts], 0, device),
        views={name: view.mul_(scale).add_(shift) for name, view in views.items()},
        affines=affines,
        labels={n: v.long() for n, v in _concatenate([part.labels for part in parts], 1, device).items()},
        extras=_concatenate([part.extras for part in parts], 0, device),
        neighbor_ids=neighbor_ids,
    )


def _join_views(parts: Sequence[Part], device: torch.device) -> dict[str, Tensor]:
    """uint8 (V, b, S, S, 3) of every part -> float (V, B, 3, S, S) in [0, 255], converted on the way."""
    views = {}
    for name, first in parts[0].views.items():
        count, _, size = first.shape[:3]
        joined = torch.empty(count, sum(len(part) for part in parts), 3, size, size, device=device)
        at = 0
        for part in parts:
            mine = part.views[name].to(device, non_blocking=True)
            joined[:, at : at + len(part)] = mine.permute(0, 1, 4, 2, 3)
            at += len(part)
        views[name] = joined
    return views


def render_views(parts: Sequence[Part], name: str, count: int, device: torch.device) -> Tensor:
    """The views of one name, (V, B, 3, S, S) float in [0, 255], rendered on `device` part by part."""
    rows = []
    for part in parts:
        pixels = [image.to(device, non_blocking=True) for image in part.pixels]
        named = [[(item, of) for item, of in draws if item.view == name] for draws in part.draws]
        views = torch.zeros(len(part), count, 3, part.sizes[name], part.sizes[name], device=device)
        flat = [(b, v, item, of) for b, draws in enumerate(named) for v, (item, of) in enumerate(draws)]
        if not flat:  # no image of this part has a neighbour
            rows.append(views)
            continue
        drawn = render_gpu.render(
            render_gpu.pad(pixels),
            [(image.shape[0], image.shape[1]) for image in part.pixels],
            [item for _, _, item, _ in flat],
            [of for *_, of in flat],
            part.reduced,
        )
        views[[b for b, *_ in flat], [v for _, v, *_ in flat]] = drawn
        rows.append(views)
    return torch.cat(rows).transpose(0, 1).contiguous()


def _concatenate(parts: Sequence[dict[str, Tensor]], axis: int, device: torch.device) -> dict[str, Tensor]:
    return {name: _cat([part[name] for part in parts], axis, device) for name in parts[0]}


def _cat(tensors: Sequence[Tensor], axis: int, device: torch.device) -> Tensor:
    return torch.cat([tensor.to(device, non_blocking=True) for tensor in tensors], axis)
