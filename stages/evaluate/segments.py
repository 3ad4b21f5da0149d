"""What `segment_linear` does to images: classes, crops, cached features, the linear layer, the test.

Features are extracted once and cached in the stage's scratch folder as float16, so that training reads memory instead
of running the encoder again. Every image is decoded once, whatever the number of encoders.

Shape legend: n cached crops, D width, h w grid of the features, S side of the training labels, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SourceError
from stages.data.images import ImageError, decode, decode_mask
from stages.evaluate.confusion import Matrix, confusion, scores
from stages.evaluate.features import Row, in_batches, prepared
from stages.evaluate.linear_probe import Probe, fit, held_out
from stages.models.inference import RGB, Inference, squeeze

if TYPE_CHECKING:
    import torch

    from pipeline.stage import Context
    from pipeline.store.artifact import Artifact
    from stages.evaluate.segment_linear import SegmentLinearConfig

Labels = NDArray[np.int16]  # (H, W) index into Classes.names; -1 void


@dataclass(frozen=True)
class Classes:
    """The classes that count: all of the masks' but the ignored one."""

    names: list[str]
    kept: list[int]  # a mask's value for each name
    ignore_index: int

    @classmethod
    def of(cls, images: Artifact) -> Classes:
        """From the images' notes. Raises SourceError where they name no classes."""
        notes = images.manifest.notes
        names: list[str] = list(notes.get("mask_classes") or ())
        ignore = int(notes.get("ignore_index", 255))
        kept = [value for value in range(len(names)) if value != ignore]
        if not kept:
            raise SourceError(
                f"{images.kind}/{images.fingerprint} names no classes for its masks (notes.mask_classes): "
                "ingest it with a layout that has masks, and name its `classes`"
            )
        return cls([names[value] for value in kept], kept, ignore)

    def labels(self, data: bytes, shape: tuple[int, ...]) -> Labels:
        """A stored mask as labels. Raises ImageError for another size or an unknown value."""
        mask = decode_mask(data)
        if mask.shape != shape:
            raise ImageError(f"its mask is {mask.shape[1]}x{mask.shape[0]}, the image {shape[1]}x{shape[0]}")
        table = np.full(65536, -2, np.int16)
        table[self.kept] = np.arange(len(self.kept))
        table[self.ignore_index] = -1
        labels: Labels = table[mask]
        if (labels == -2).any():
            raise ImageError(f"its mask has the value {int(mask[labels == -2][0])}, which is no class")
        return labels


@dataclass(frozen=True)
class Cache:
    """Features of every train crop by encoder, and the labels they share."""

    maps: dict[str, NDArray[np.float16]]  # (n, D, h, w)
    labels: Labels  # (n, S, S)
    device: torch.device


@dataclass(frozen=True)
class Trained:
    probe: Probe
    lr: float


def cache_train(
    images: Artifact,
    ids: Sequence[int],
    classes: Classes,
    inferences: Mapping[str, Inference],
    config: SegmentLinearConfig,
    context: Context,
    problems: list[dict[str, str]],
) -> Cache:
    """Encodes the crops of the train images, once."""
    views = max(1, config.crops)
    generator = np.random.default_rng(config.seed)
    most = max(1, config.samples // views)  # images that will never be drawn need no features
    chosen = ids if len(ids) <= most else sorted(generator.choice(ids, most, replace=False).tolist())
    folder = context.output.scratch
    maps: dict[str, Any] = {}
    labels = np.lib.format.open_memmap(
        folder / "labels.npy", "w+", np.int16, (len(chosen) * views, config.label_size, config.label_size)
    )
    done = 0
    source = prepared(
        images,
        ["key", "image", "mask"],
        partial(_train_crops, classes=classes, config=config),
        set(chosen),
        problems=problems,
    )
    for batch in in_batches(source, max(1, (context.resources.batch_size or 32) // views)):
        crops = [crop for of_image in batch for crop in of_image]
        for name, inference in inferences.items():
            found = inference([pixels for pixels, _ in crops]).map.cpu().numpy()
            if name not in maps:
                shape = (len(labels), *found.shape[1:])
                maps[name] = np.lib.format.open_memmap(folder / f"maps{name}.npy", "w+", np.float16, shape)
            maps[name][done : done + len(crops)] = found
        labels[done : done + len(crops)] = [mask for _, mask in crops]
        done += len(crops)
        context.report_progress(done // views, len(chosen), "train images")
    if not done:
        raise SourceError(f"{context.name}: none of the {len(chosen)} train images can be used: {problems[0]}")
    device = next(iter(inferences.values())).device
    return Cache({name: stored[:done] for name, stored in maps.items()}, labels[:done], device)


def train_probe(cache: Cache, name: str, classes: int, config: SegmentLinearConfig, context: Context) -> Trained:
    """The linear layer on one encoder's features; of several learning rates, the best on a held-out fifth."""
    rates = config.lr if isinstance(config.lr, list) else [config.lr]
    maps, labels = cache.maps[name], cache.labels
    total = config.samples * (len(rates) + 1 if len(rates) > 1 else 1)

    def train(rows: NDArray[np.int64], lr: float, before: int) -> Probe:
        return fit(
            maps,
            labels,
            rows,
            classes,
            lr=lr,
            samples=config.samples,
            batch_size=config.batch_size,
            seed=config.seed,
            device=cache.device,
            progress=lambda done: context.report_progress(before + done, total, f"samples{name}"),
        )

    everything = np.arange(len(labels))
    if len(rates) == 1 or len(labels) < 2:
        return Trained(train(everything, rates[0], 0), rates[0])
    rest, held = held_out(len(labels), config.seed)
    reached: list[float] = []
    for i, lr in enumerate(rates):
        matrix = _score(train(rest, lr, i * config.samples), maps, labels, held, classes, cache.device)
        reached.append(scores(matrix, config.absent).miou if matrix.sum() else 0.0)
    best = rates[int(np.argmax(reached))]
    return Trained(train(everything, best, len(rates) * config.samples), best)


def evaluate(
    images: Artifact,
    ids: Sequence[int],
    classes: Classes,
    inferences: Mapping[str, Inference],
    probes: Mapping[str, Trained],
    config: SegmentLinearConfig,
    context: Context,
    problems: list[dict[str, str]],
    *,
    show: int,
) -> tuple[dict[str, Matrix], list[tuple[RGB, Labels, NDArray[Any]]]]:
    """Confusion matrices over all test pixels at the masks' own sizes, and a few (pixels, truth, prediction)."""
    matrices = {name: np.zeros((len(classes.names),) * 2, np.int64) for name in inferences}
    pictures = []
    picked = {ids[int(i)] for i in np.linspace(0, len(ids) - 1, show)}
    source = prepared(
        images,
        ["key", "image", "mask"],
        partial(_test_image, classes=classes, config=config),
        set(ids),
        problems=problems,
    )
    done = 0
    for batch in in_batches(source, context.resources.batch_size or 16):
        for name, inference in inferences.items():
            maps = inference([fitted for _, fitted, _, _ in batch]).map
            for (image_id, _, pixels, truth), map_Dhw in zip(batch, maps, strict=True):
                prediction = probes[name].probe.predict(map_Dhw, *truth.shape)
                matrices[name] += confusion(truth, prediction, len(classes.names))
                if name == "" and image_id in picked:
                    pictures.append((pixels, truth, prediction))
        done += len(batch)
        context.report_progress(done, len(ids), "test images")
    if not any(matrix.sum() for matrix in matrices.values()):
        raise SourceError(
            f"{context.name}: no pixel of the {len(ids)} test images has a class, all is void or unreadable "
            f"({len(problems)} unreadable): check ignore_index ({classes.ignore_index}) and the masks"
        )
    return matrices, pictures


def _score(
    probe: Probe, maps: NDArray[np.float16], labels: Labels, rows: NDArray[np.int64], classes: int, device: torch.device
) -> Matrix:
    import torch

    matrix = np.zeros((classes, classes), np.int64)
    for row in rows:
        prediction = probe.predict(torch.from_numpy(np.array(maps[row])).to(device).float(), *labels.shape[1:])
        matrix += confusion(labels[row], prediction, classes)
    return matrix


# -- in threads ----------------------------------------------------------------------------------------------


def _train_crops(row: Row, *, classes: Classes, config: SegmentLinearConfig) -> list[tuple[RGB, Labels]]:
    pixels = decode(row["image"])
    labels = classes.labels(row["mask"], pixels.shape[:2])
    if not config.crops:
        return [_fit(pixels, labels, config)]
    generator = np.random.default_rng((config.seed, row["image_id"]))
    crops = []
    for _ in range(config.crops):
        top, left, height, width = _draw_crop(generator, labels.shape[0], labels.shape[1], config.crop_scale)
        part = np.s_[top : top + height, left : left + width]
        crops.append(_fit(pixels[part], labels[part], config))
    return crops


def _fit(pixels: RGB, labels: Labels, config: SegmentLinearConfig) -> tuple[RGB, Labels]:
    side = config.label_size
    small = cv2.resize(np.ascontiguousarray(labels), (side, side), interpolation=cv2.INTER_NEAREST_EXACT)
    return squeeze(np.ascontiguousarray(pixels), config.train_size, config.train_size), small


def _draw_crop(
    generator: np.random.Generator, height: int, width: int, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """A rectangle (top, left, height, width) of that share of the area, aspect within 3/4 to 4/3 of the image's."""
    area = generator.uniform(*scale)
    aspect = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
    h = min(height, max(1, round(height * np.sqrt(area / aspect))))
    w = min(width, max(1, round(width * np.sqrt(area * aspect))))
    return int(generator.integers(height - h + 1)), int(generator.integers(width - w + 1)), h, w


def _test_image(row: Row, *, classes: Classes, config: SegmentLinearConfig) -> tuple[int, RGB, RGB, Labels]:
    pixels = decode(row["image"])
    labels = classes.labels(row["mask"], pixels.shape[:2])
    return row["image_id"], squeeze(pixels, config.test_size, config.test_size), pixels, labels
