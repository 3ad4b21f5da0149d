"""One vector an object, pooled from its box, with the rest of the image as it is or replaced by another image.

Source: docs/methods.md#k-nn-of-objects.

Shape legend: B images, N objects, D width, H W sides of an image, h w of a map, S cells of a pooled region.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torchvision.ops import roi_align

from stages.data.ahead import in_batches
from stages.data.images import ImageError, decode
from stages.data.prepared import prepared
from stages.data.tables import Table
from stages.evaluate.classify_objects_settings import ClassifyObjectsConfig
from stages.evaluate.object_bank import SplitObjects
from stages.models.encoder import Encoder
from stages.models.inference import RGB, default_device, squeeze

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact

_TRIES = 10  # images drawn for a background before giving up on those that cannot be decoded


@dataclass(frozen=True)
class ObjectView:
    """An image as an encoder sees it, and the objects that are pooled from it."""

    pixels: RGB  # (H, W, 3)
    rows: list[int]  # of the objects, in their SplitObjects
    boxes: NDArray[np.float32]  # (N, 4) in these pixels


class ObjectEncoder:
    """A frozen encoder that gives one unit vector a box.

    Args:
        encoder: put on the GPU where there is one.
        pool_from: "c4": of a ResNet, regions are cut from C4 and pass through C5, as D3SSL trains; other encoders have
            none, and their map is used. "map": regions are cut from the encoder's map.
        size: S, cells a side that RoIAlign gives.
        precision: of the forward pass.
    """

    def __init__(
        self, encoder: Encoder, *, pool_from: Literal["c4", "map"], size: int, precision: Literal["fp32", "bf16"]
    ) -> None:
        self.device = default_device()
        self.encoder = encoder.to(self.device).eval().requires_grad_(False)
        self.from_c4 = pool_from == "c4" and encoder.is_resnet
        self.size, self.precision = size, precision

    @torch.inference_mode()
    def __call__(self, views: Sequence[ObjectView]) -> Tensor:
        """Views of one size -> unit vectors of all their boxes, in order, (N, D) on the CPU."""
        images_B3HW = torch.from_numpy(np.stack([view.pixels for view in views])).to(self.device)
        normalised_B3HW = self.encoder.normalise(images_B3HW.permute(0, 3, 1, 2).float() / 255)
        with self._autocast():
            map_BDhw = self.encoder.stem_to_c4(normalised_B3HW) if self.from_c4 else self.encoder(normalised_B3HW).map
        (height, width), (h, w) = normalised_B3HW.shape[2:], map_BDhw.shape[2:]
        cells = torch.tensor([w / width, h / height] * 2, device=self.device)
        boxes = [torch.from_numpy(view.boxes).to(self.device) * cells for view in views]
        regions_NDSS = roi_align(map_BDhw.float(), boxes, self.size, aligned=True)
        if self.from_c4:
            with self._autocast():
                regions_NDSS = self.encoder.c5(regions_NDSS)
        return functional.normalize(regions_NDSS.float().mean(dim=(2, 3)), dim=1).cpu()

    def _autocast(self) -> Any:
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()


class ShownObject(NamedTuple):
    """An object for the preview."""

    row: int  # of the encoded objects
    pixels: RGB  # what the encoder saw
    box: NDArray[np.float32]  # (4,) in these pixels


@dataclass(frozen=True)
class EncodedObjects:
    """The objects of a split that could be encoded."""

    objects: SplitObjects
    by_encoder: dict[str, Tensor]  # the suffix of the encoder's metrics -> unit vectors, (N, D)
    shown: list[ShownObject]


def encode_objects(
    images: Artifact,
    objects: SplitObjects,
    encoders: Mapping[str, ObjectEncoder],
    config: ClassifyObjectsConfig,
    *,
    backgrounds: NDArray[np.int64] | None,
    batch_size: int,
    show: int,
    problems: list[dict[str, str]],
    report: Callable[[int], None],
) -> EncodedObjects:
    """The vectors of objects; every image is decoded once and given to all encoders.

    Args:
        images: the artifact.
        objects: what is encoded.
        encoders: by the suffix of their metrics.
        config: says the size and the seed.
        backgrounds: ids of images; all pixels outside of an object's box are those of one of these, drawn for each
            object. None: the image as it is.
        batch_size: views of one forward pass.
        show: how many objects to return with their views, spread evenly.
        problems: grows by an entry for each image that cannot be decoded; its objects are left out.
        report: called with the number of objects encoded so far.
    """
    stride = next(iter(encoders.values())).encoder.stride
    rows_of: dict[int, list[int]] = {}
    for row, image_id in enumerate(objects.images.tolist()):
        rows_of.setdefault(image_id, []).append(row)
    table = None if backgrounds is None else Table.open(images, ["image"])

    def prepare(row: Mapping[str, Any]) -> list[ObjectView]:
        pixels, rows = decode(row["image"]), rows_of[row["image_id"]]
        sized = keep_aspect(pixels, config.size, stride)
        factor = np.tile(np.array(sized.shape[1::-1]) / np.array(pixels.shape[1::-1]), 2)
        boxes = (objects.boxes[rows] * factor).astype(np.float32)
        if table is None or backgrounds is None:
            return [ObjectView(sized, rows, boxes)]
        views = []
        for one, box in zip(rows, boxes, strict=True):
            generator = np.random.default_rng((config.seed, row["image_id"], int(objects.places[one])))
            other = _drawn(generator, table, backgrounds, row["image_id"])
            views.append(ObjectView(disturb(sized, box, other), [one], box[None]))
        return views

    picked = {int(row) for row in np.linspace(0, len(objects) - 1, show)}
    done: list[int] = []
    shown: list[ShownObject] = []
    found: dict[str, list[Tensor]] = {name: [] for name in encoders}
    source = prepared(images, ["key", "image"], prepare, set(rows_of), problems=problems)
    for batch in in_batches(itertools.chain.from_iterable(source), batch_size):
        for _, group in itertools.groupby(batch, key=lambda view: view.pixels.shape):
            views = list(group)
            for name, encoder in encoders.items():
                found[name].append(encoder(views))
            for view in views:
                shown += [
                    ShownObject(len(done) + i, view.pixels, view.boxes[i])
                    for i, row in enumerate(view.rows)
                    if row in picked
                ]
                done += view.rows
        report(len(done))
    vectors = {name: torch.cat(parts) if parts else torch.empty(0, 0) for name, parts in found.items()}
    return EncodedObjects(objects.taken(np.array(done, np.int64)), vectors, shown)


def keep_aspect(pixels: RGB, size: int, stride: int) -> RGB:
    """The image with an area of about size x size pixels; its aspect is kept but for whole multiples of the stride."""
    root = (pixels.shape[0] / pixels.shape[1]) ** 0.5
    height, width = (max(round(side / stride), 1) * stride for side in (size * root, size / root))
    return squeeze(pixels, height, width)


def disturb(pixels: RGB, box_4: NDArray[np.float32], other: RGB) -> RGB:
    """`other` at the size of `pixels`, with the pixels that the box touches in its place."""
    height, width = pixels.shape[:2]
    x0, y0 = (
        int(np.clip(np.floor(value), 0, most - 1)) for value, most in zip(box_4[:2], (width, height), strict=True)
    )
    x1, y1 = (int(np.clip(np.ceil(value), 1, most)) for value, most in zip(box_4[2:], (width, height), strict=True))
    inside = np.s_[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
    composed = squeeze(other, height, width).copy()
    composed[inside] = pixels[inside]
    return composed


def _drawn(generator: np.random.Generator, table: Table, ids: NDArray[np.int64], own: int) -> RGB:
    """A random image that is not the object's own. Raises ImageError where none of several draws can be decoded."""
    reason = ""
    for _ in range(_TRIES):
        drawn = int(ids[generator.integers(len(ids))])
        while drawn == own:
            drawn = int(ids[generator.integers(len(ids))])
        try:
            return decode(table.row(drawn)["image"])
        except ImageError as error:
            reason = str(error)
    raise ImageError(f"none of {_TRIES} images drawn as its surroundings can be decoded; the last: {reason}")
