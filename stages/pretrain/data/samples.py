"""One image's way from its rows in the tables to its views. Runs inside the worker processes.

What an image becomes hangs on (seed, epoch, source, image id) alone, never on the process, rank or order.
An image that cannot be used is replaced by another of its source, and the reason is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SourceError
from stages.data.images import ImageError, decode, decode_reduced
from stages.data.tables import unpack_labels
from stages.pretrain.data.sampler import Slot
from stages.pretrain.views import render_cpu
from stages.pretrain.views.draw import draw, draw_neighbor, generator, reduction
from stages.pretrain.views.plan import Draw, ImageRow, ViewPlan

MAX_TRIES = 1000  # images tried for one place in a batch before the run stops
UNREADABLE = "unreadable image"
Pixels = NDArray[np.uint8]


class RowReader(Protocol):
    """What is used of `stages.data.tables.Table`."""

    ids: NDArray[np.int64]

    def row(self, image_id: int) -> dict[str, Any]: ...

    def __contains__(self, image_id: int) -> bool: ...


@dataclass(frozen=True)
class ImageSource:
    """One image set of a mixture, with the tables that were made from it. Picklable, as the tables are."""

    images: RowReader  # columns key, image, width, height
    ids: Sequence[int] | NDArray[np.int64] | None = None  # train on these only; default: all
    weight: float = 1.0
    role: Literal["objects", "scenes"] = "objects"
    boxes: RowReader | None = None
    superpixels: RowReader | None = None
    neighbors: RowReader | None = None
    embeddings: RowReader | None = None

    @cached_property
    def chosen(self) -> NDArray[np.int64]:
        return np.sort(np.asarray(self.images.ids if self.ids is None else self.ids, np.int64))

    def trains_on(self, image_id: int) -> bool:
        at = int(np.searchsorted(self.chosen, image_id))
        return at < len(self.chosen) and int(self.chosen[at]) == image_id


@dataclass(frozen=True)
class Skip:
    """An image that another one replaced."""

    key: str
    reason: str  # a few words; what is counted
    detail: str = ""


@dataclass
class Sample:
    """One row of a batch, still uint8. Either `views` are rendered, or `pixels` and `draws` wait for the GPU."""

    image_id: int
    source: int
    neighbor_id: int
    affines: dict[str, NDArray[np.float32]]  # name -> (V, 2, 3)
    labels: dict[str, NDArray[np.int32]]  # name -> (V, S, S)
    extras: dict[str, NDArray[Any]]
    sizes: dict[str, int] = field(default_factory=dict)  # name -> S
    views: dict[str, Pixels] = field(default_factory=dict)  # name -> (V, S, S, 3)
    pixels: list[Pixels] = field(default_factory=list)  # the image and, where one is drawn, its neighbour
    reduced: list[int] = field(default_factory=list)  # the scale each was decoded at
    draws: list[tuple[Draw, int]] = field(default_factory=list)  # and which of `pixels` it cuts
    skipped: list[Skip] = field(default_factory=list)


class _Unusable(Exception):
    def __init__(self, skip: Skip) -> None:
        self.skip = skip


class Reader:
    """Reads slots. Holds open tables and no state: the same slot always gives the same sample."""

    def __init__(self, sources: Sequence[ImageSource], plan: ViewPlan, seed: int, *, render: bool = True) -> None:
        self.sources, self.plan, self.seed, self.render = tuple(sources), plan, seed, render
        self._wants_neighbor = any(spec.of == "neighbor" for spec in plan.views)

    def read(self, slot: Slot) -> Sample:
        """The slot's sample, or that of another image of its source. Raises SourceError when none can be used."""
        source, skipped = self.sources[slot.source], list[Skip]()
        for attempt, image_id in enumerate(self._candidates(slot)):
            try:
                sample = self._read(slot, source, image_id, slot.again + (attempt << 20))
            except _Unusable as unusable:
                skipped.append(unusable.skip)
                continue
            sample.skipped = skipped
            return sample
        last = skipped[-1]
        raise SourceError(
            f"images: none of the {len(skipped)} images tried of source {slot.source} can be trained on; the last, "
            f"{last.key}: {last.reason}{f' ({last.detail})' if last.detail else ''}. "
            "Check the source, and whether the method's boxes or superpixels fit it."
        )

    def _candidates(self, slot: Slot) -> Iterator[int]:
        ids = self.sources[slot.source].chosen
        yield int(ids[slot.index])
        rng = generator(self.seed, slot.epoch, slot.source, int(ids[slot.index]), slot.again + (1 << 62))
        if len(ids) <= MAX_TRIES:
            yield from (int(ids[i]) for i in rng.permutation(len(ids)) if i != slot.index)
        else:
            yield from (int(ids[i]) for i in rng.integers(0, len(ids), MAX_TRIES - 1))

    def _read(self, slot: Slot, source: ImageSource, image_id: int, again: int) -> Sample:
        rng = generator(self.seed, slot.epoch, slot.source, image_id, again)
        stored = source.images.row(image_id)
        whole = cache(lambda: _pixels(stored, 1)[0])
        row = self._image_row(stored, source, image_id, whole)
        drawn = draw(self.plan, rng, row)
        if drawn.skipped:
            raise _Unusable(Skip(str(stored["key"]), drawn.skipped))
        looked_at = whole.cache_info().currsize > 0  # by the drawer: then it is not decoded again
        pixels, reduced = (whole(), 1) if looked_at else _pixels(stored, reduction(drawn.draws))
        sample = Sample(image_id, slot.source, -1, {}, {}, drawn.extras, pixels=[pixels], reduced=[reduced])
        sample.draws = [(item, 0) for item in drawn.draws]
        if "embeddings" in self.plan.tables and source.embeddings is not None:
            if image_id not in source.embeddings:
                raise _Unusable(Skip(str(stored["key"]), "no embedding"))
            sample.extras["embedding"] = np.asarray(source.embeddings.row(image_id)["embedding"], np.float32)
        if self._wants_neighbor:
            self._add_neighbor(sample, slot, source, again)
        self._finish(sample, row)
        return sample

    def _image_row(
        self, stored: dict[str, Any], source: ImageSource, image_id: int, pixels: Callable[[], Pixels]
    ) -> ImageRow:
        boxes = superpixels = None
        if "boxes" in self.plan.tables and source.boxes is not None:
            found = source.boxes.row(image_id)["boxes"] if image_id in source.boxes else ()
            boxes = np.asarray(found, np.float32).reshape(-1, 4)
        if "superpixels" in self.plan.tables and source.superpixels is not None:
            if image_id not in source.superpixels:
                raise _Unusable(Skip(str(stored["key"]), "no superpixels"))
            superpixels = unpack_labels(source.superpixels.row(image_id)["labels"]).astype(np.int32)
        width, height = int(stored["width"]), int(stored["height"])
        return ImageRow(image_id, width, height, pixels, boxes, superpixels)

    def _add_neighbor(self, sample: Sample, slot: Slot, source: ImageSource, again: int) -> None:
        """A uniformly drawn readable neighbour; none at all leaves `neighbor_id` at -1 and black views."""
        table = source.neighbors
        if table is None or sample.image_id not in table:
            return
        rng = generator(self.seed, slot.epoch, slot.source, sample.image_id, again + (1 << 61))
        row = [int(i) for i in table.row(sample.image_id)["neighbors"] if source.trains_on(int(i))]
        for i in rng.permutation(len(row)):
            stored = source.images.row(row[i])
            draws = draw_neighbor(self.plan, rng, int(stored["width"]), int(stored["height"]))
            try:
                pixels, reduced = _pixels(stored, reduction(draws))
            except _Unusable:
                continue
            sample.neighbor_id = row[i]
            sample.pixels.append(pixels)
            sample.reduced.append(reduced)
            sample.draws += [(item, 1) for item in draws]
            return

    def _finish(self, sample: Sample, row: ImageRow) -> None:
        """Renders the views (or leaves that to the GPU) and stacks what belongs to them, by name."""
        named: dict[str, list[tuple[Draw, int]]] = {}
        for item, of in sample.draws:
            named.setdefault(item.view, []).append((item, of))
        for name, items in named.items():
            sample.sizes[name] = items[0][0].size
            sample.affines[name] = np.stack([item.affine for item, _ in items]).astype(np.float32)
            if any(item.labels for item, _ in items):
                if row.superpixels is None:
                    raise SourceError(f"view {name!r} asks for labels: give the method a `superpixels` input")
                sample.labels[name] = np.stack([render_cpu.cut_labels(row.superpixels, item) for item, _ in items])
            if self.render:
                sample.views[name] = np.stack(
                    [render_cpu.render(sample.pixels[of], item, sample.reduced[of]) for item, of in items]
                )
        for spec in self.plan.views:
            if spec.of == "neighbor" and spec.name not in named:
                sample.sizes[spec.name] = spec.size
                sample.affines[spec.name] = np.tile(np.eye(2, 3, dtype=np.float32), (spec.count, 1, 1))
                if self.render:
                    sample.views[spec.name] = np.zeros((spec.count, spec.size, spec.size, 3), np.uint8)
        if self.render:
            sample.pixels, sample.draws = [], []


def _pixels(stored: dict[str, Any], reduced: int) -> tuple[Pixels, int]:
    key, data = str(stored["key"]), stored["image"]
    try:
        pixels, reduced = decode_reduced(data, reduced) if reduced > 1 else (decode(data), 1)
    except ImageError as error:
        raise _Unusable(Skip(key, UNREADABLE, str(error))) from None
    expected = (-(-int(stored["height"]) // reduced), -(-int(stored["width"]) // reduced))
    if pixels.shape[:2] != expected:
        detail = f"decodes to {pixels.shape[1]}x{pixels.shape[0]}, its row says {expected[1]}x{expected[0]}"
        raise _Unusable(Skip(key, UNREADABLE, detail))
    return pixels, reduced
