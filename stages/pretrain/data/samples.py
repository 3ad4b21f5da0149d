"""One image's way from its rows in the tables to its views. Runs inside the loader processes.

What an image becomes depends on the seed and on its slot (sampler.py) alone, never on the process, rank or order in
which it is read. An image that cannot be used is replaced by another of its source, and the reason is kept.
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
from stages.pretrain.views import render_cpu
from stages.pretrain.views.draw import draw, draw_neighbor, generator, reduction
from stages.pretrain.views.plan import Draw, ImageRow, Pixels, ViewPlan
from stages.training.sampler import Slot

MAX_TRIES = 1000  # images tried for one row of a batch before training stops
UNREADABLE = "unreadable image"

# An image may be read several times in an epoch, each time with a random stream of its own. A stream's number is the
# slot's `repeat`, plus ATTEMPT for each image that was tried in this slot before, plus one of the other two where the
# stream is not for the image's own views.
ATTEMPT = 1 << 20
NEIGHBOR = 1 << 61  # which neighbour, and its views
REPLACEMENT = 1 << 62  # the order in which other images are tried


class RowReader(Protocol):
    """What is used of `stages.data.tables.Table`."""

    ids: NDArray[np.int64]

    def row(self, image_id: int) -> dict[str, Any]:
        """An image's row, by column."""

    def __contains__(self, image_id: int) -> bool: ...


@dataclass(frozen=True)
class ImageSource:
    """One image set of a mixture, with the tables that were made from it. It pickles, as tables do."""

    images: RowReader  # columns key, image, width, height
    ids: Sequence[int] | NDArray[np.int64] | None = None  # train on these only; default: all
    weight: float = 1.0  # share of every batch, relative to the other sources
    role: Literal["objects", "scenes"] = "objects"  # "objects": one main object a picture
    boxes: RowReader | None = None
    superpixels: RowReader | None = None
    neighbors: RowReader | None = None
    embeddings: RowReader | None = None

    @cached_property
    def chosen(self) -> NDArray[np.int64]:
        """Ids of the images to train on, sorted."""
        return np.sort(np.asarray(self.images.ids if self.ids is None else self.ids, np.int64))

    def trains_on(self, image_id: int) -> bool:
        """Whether an image is among the chosen ones."""
        at = int(np.searchsorted(self.chosen, image_id))
        return at < len(self.chosen) and int(self.chosen[at]) == image_id


@dataclass(frozen=True)
class Skip:
    """An image that another one replaced."""

    key: str
    reason: str  # a few words, the same for all images with this fault: images are counted by it
    detail: str = ""


@dataclass
class Sample:
    """One row of a batch, still uint8: either rendered (`views`), or with what a GPU needs (`pixels`, `draws`)."""

    image_id: int
    source: int
    neighbor_id: int
    affines: dict[str, NDArray[np.float32]]  # name -> (V, n, 2, 3): n is 0 for a neighbour that is not there, else 1
    labels: dict[str, NDArray[np.int32]]  # name -> (V, n, S, S)
    extras: dict[str, NDArray[Any]]
    sizes: dict[str, int] = field(default_factory=dict)  # name -> S
    views: dict[str, Pixels] = field(default_factory=dict)  # name -> (V, n, S, S, 3)
    pixels: list[Pixels] = field(default_factory=list)  # the image and, where one is drawn, its neighbour
    reduced: list[int] = field(default_factory=list)  # of each: it was decoded at 1/reduced of its size
    draws: list[tuple[Draw, int]] = field(default_factory=list)  # and which of `pixels` each cuts
    skipped: list[Skip] = field(default_factory=list)


class _Unusable(Exception):
    def __init__(self, skip: Skip) -> None:
        self.skip = skip


class Reader:
    """Turns slots into samples. It keeps tables open and nothing else: the same slot always gives the same sample.

    Args:
        sources: by their number in a slot.
        plan: the method's views and tables.
        seed: of every random choice, together with the slot.
        render: whether samples get rendered views; else decoded pixels and draws.
    """

    def __init__(self, sources: Sequence[ImageSource], plan: ViewPlan, seed: int, *, render: bool = True) -> None:
        self.sources, self.plan, self.seed, self.render = tuple(sources), plan, seed, render
        self._wants_neighbor = any(spec.of == "neighbor" for spec in plan.views)

    def read(self, slot: Slot) -> Sample:
        """The slot's sample, or that of another image of its source where the slot's own cannot be used.

        Raises:
            SourceError: when none of the images tried can be used.
        """
        source, skipped = self.sources[slot.source], list[Skip]()
        for attempt, image_id in enumerate(self._candidates(slot)):
            try:
                sample = self._read(slot, source, image_id, slot.repeat + attempt * ATTEMPT)
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
        """The slot's image, then others of its source in random order."""
        ids = self.sources[slot.source].chosen
        yield int(ids[slot.index])
        rng = generator(self.seed, slot.epoch, slot.source, int(ids[slot.index]), slot.repeat + REPLACEMENT)
        if len(ids) <= MAX_TRIES:
            yield from (int(ids[i]) for i in rng.permutation(len(ids)) if i != slot.index)
        else:
            yield from (int(ids[i]) for i in rng.integers(0, len(ids), MAX_TRIES - 1))

    def _read(self, slot: Slot, source: ImageSource, image_id: int, stream: int) -> Sample:
        rng = generator(self.seed, slot.epoch, slot.source, image_id, stream)
        stored = source.images.row(image_id)
        whole = cache(lambda: _pixels(stored, 1)[0])
        row = self._image_row(stored, source, image_id, whole)
        drawn = draw(self.plan, rng, row)
        if drawn.skipped:
            raise _Unusable(Skip(str(stored["key"]), drawn.skipped))
        is_decoded = whole.cache_info().currsize > 0  # because the drawer looked at the pixels
        pixels, reduced = (whole(), 1) if is_decoded else _pixels(stored, reduction(drawn.draws))
        sample = Sample(image_id, slot.source, -1, {}, {}, drawn.extras, pixels=[pixels], reduced=[reduced])
        sample.draws = [(item, 0) for item in drawn.draws]
        if "embeddings" in self.plan.tables and source.embeddings is not None:
            if image_id not in source.embeddings:
                raise _Unusable(Skip(str(stored["key"]), "no embedding"))
            sample.extras["embedding"] = np.asarray(source.embeddings.row(image_id)["embedding"], np.float32)
        if self._wants_neighbor:
            self._add_neighbor(sample, slot, source, stream)
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

    def _add_neighbor(self, sample: Sample, slot: Slot, source: ImageSource, stream: int) -> None:
        """Adds one of the image's readable neighbours, drawn uniformly; without any, `neighbor_id` stays at -1."""
        table = source.neighbors
        if table is None or source.role != "objects" or sample.image_id not in table:
            return
        rng = generator(self.seed, slot.epoch, slot.source, sample.image_id, stream + NEIGHBOR)
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
        """Renders the views (or leaves that to the GPU) and stacks them and their geometry by name."""
        named: dict[str, list[tuple[Draw, int]]] = {}
        for item, image in sample.draws:
            named.setdefault(item.view, []).append((item, image))
        for name, items in named.items():
            sample.sizes[name] = items[0][0].size
            sample.affines[name] = np.stack([item.affine for item, _ in items])[:, None].astype(np.float32)
            if any(item.labels for item, _ in items):
                if row.superpixels is None:
                    raise SourceError(f"view {name!r} asks for labels: give the method a `superpixels` input")
                labels = [render_cpu.cut_labels(row.superpixels, item) for item, _ in items]
                sample.labels[name] = np.stack(labels)[:, None]
            if self.render:
                views = [render_cpu.render(sample.pixels[image], item, sample.reduced[image]) for item, image in items]
                sample.views[name] = np.stack(views)[:, None]
        for spec in self.plan.views:
            if spec.of == "neighbor" and spec.name not in named:  # no neighbour: no row
                sample.sizes[spec.name] = spec.size
                sample.affines[spec.name] = np.empty((spec.count, 0, 2, 3), np.float32)
                if self.render:
                    sample.views[spec.name] = np.empty((spec.count, 0, spec.size, spec.size, 3), np.uint8)
        if self.render:
            sample.pixels, sample.draws = [], []


def _pixels(stored: dict[str, Any], reduced: int) -> tuple[Pixels, int]:
    """An image decoded at 1/`reduced` of its size where its format allows it, and the reduction that it got."""
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
