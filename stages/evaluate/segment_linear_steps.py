"""The three steps of `segment_linear`: encode and cache the train crops, train a decoder, score the test images.

Features are extracted once and cached in the stage's scratch folder as float16, so that training reads memory instead
of running the encoder again. Every image is decoded once, however many encoders are compared.

Shape legend: n cached crops, D width, h w grid of the features, S side of the training labels, H W sides of an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import SourceError
from pipeline.stage import Context
from stages.data.ahead import in_batches
from stages.data.confusion import Matrix, confusion, scores
from stages.data.mask_classes import MaskClasses, MaskLabels
from stages.data.prepared import prepared
from stages.data.segmented_test import require_classes
from stages.data.units import Units
from stages.evaluate.held_out import held_out
from stages.evaluate.segment_linear_settings import SegmentLinearConfig
from stages.evaluate.segment_linear_views import ScoredImage, joined, scored_image, train_crops
from stages.evaluate.segmentation_decoders import SegmentationDecoder, fit, largest, total_samples
from stages.models.inference import RGB, Inference

_COLUMNS = ("key", "image", "mask")


@dataclass(frozen=True)
class TrainCache:
    """Features of every train crop by encoder, and the labels they share."""

    maps: dict[str, NDArray[np.float16]]  # (n, D, h, w)
    labels: MaskLabels  # (n, S, S)
    device: torch.device  # where the encoders are, and the decoder trains


class TrainedProbe(NamedTuple):
    """A decoder and the learning rate it was trained with."""

    decoder: SegmentationDecoder
    lr: float


class ShownImage(NamedTuple):
    """A test image for the preview."""

    pixels: RGB  # (H, W, 3)
    truth: MaskLabels  # (H, W)
    prediction: NDArray[np.int64]  # (H, W)


@dataclass(frozen=True)
class LinearSegmentation:
    """One evaluation: what its steps share."""

    context: Context
    config: SegmentLinearConfig
    classes: MaskClasses
    inferences: Mapping[str, Inference]  # by the suffix of the encoder's metrics: "" and "_random"
    problems: list[dict[str, str]]  # images that cannot be used; every step adds its own
    units: Units  # the test images of the encoder that is evaluated; the test adds them

    def cache_train(self, image_ids: Sequence[int]) -> TrainCache:
        """The features of the train images' crops. Raises SourceError without a usable image or a second class."""
        config, context = self.config, self.context
        views = max(1, config.crops)
        generator = np.random.default_rng(config.seed)
        # Images that will never be drawn need no features.
        most = len(image_ids) if config.epochs is not None else max(1, config.samples // views)
        chosen = image_ids
        if len(image_ids) > most:
            chosen = sorted(generator.choice(image_ids, most, replace=False).tolist())
        folder = context.output.scratch
        maps: dict[str, Any] = {}
        labels = np.lib.format.open_memmap(
            folder / "labels.npy", "w+", np.int16, (len(chosen) * views, config.label_size, config.label_size)
        )
        done, pixels = 0, np.zeros(len(self.classes.names) + 1, np.int64)  # the first: void
        prepare = partial(train_crops, classes=self.classes, config=config)
        source = prepared(context.inputs["images"], _COLUMNS, prepare, set(chosen), problems=self.problems)
        for batch in in_batches(source, max(1, (context.resources.batch_size or 32) // views)):
            crops = [crop for crops_of_image in batch for crop in crops_of_image]
            for name, inference in self.inferences.items():
                features = inference([pixels for pixels, _ in crops]).map.cpu().numpy()
                if name not in maps:
                    shape = (len(labels), *features.shape[1:])
                    maps[name] = np.lib.format.open_memmap(folder / f"maps{name}.npy", "w+", np.float16, shape)
                maps[name][done : done + len(crops)] = features
            labels[done : done + len(crops)] = [mask for _, mask in crops]
            pixels += np.bincount(labels[done : done + len(crops)].ravel() + 1, minlength=len(pixels))
            done += len(crops)
            context.report_progress(done // views, len(chosen), "train images")
        if not done:
            first = self.problems[0]
            raise SourceError(
                f"{context.name}: none of the {len(chosen)} train images can be used; "
                f"the first is {first['key']}: {first['reason']}"
            )
        require_classes(context.name, f"train images ({config.train_split})", pixels[1:], self.classes)
        device = next(iter(self.inferences.values())).device
        return TrainCache({name: stored[:done] for name, stored in maps.items()}, labels[:done], device)

    def train(self, cache: TrainCache, name: str) -> TrainedProbe:
        """The decoder on one encoder's features; of several learning rates, the best on a held-out fifth.

        Args:
            cache: what `cache_train` gave.
            name: the encoder, a key of `inferences`.
        """
        config, rates = self.config, self.config.learning_rates
        maps, labels, classes = cache.maps[name], cache.labels, len(self.classes.names)
        samples = total_samples(config, len(labels))
        total = samples * (len(rates) + 1 if len(rates) > 1 else 1)

        def train_on(rows: NDArray[np.int64], lr: float, before: int) -> SegmentationDecoder:
            return fit(
                maps,
                labels,
                rows,
                classes,
                lr=lr,
                config=config,
                device=cache.device,
                report=lambda done: self.context.report_progress(before + done, total, f"samples{name}"),
            )

        everything = np.arange(len(labels))
        if len(rates) == 1 or len(labels) < 2:
            return TrainedProbe(train_on(everything, rates[0], 0), rates[0])
        rest, held = held_out(len(labels), config.seed)
        reached: list[float] = []
        for i, lr in enumerate(rates):
            matrix = _score_cached(train_on(rest, lr, i * samples), cache, name, held, classes)
            reached.append(scores(matrix, config.absent).miou if matrix.sum() else 0.0)
        best = rates[int(np.argmax(reached))]
        return TrainedProbe(train_on(everything, best, len(rates) * samples), best)

    def test(
        self, image_ids: Sequence[int], probes: Mapping[str, TrainedProbe], *, show: int
    ) -> tuple[dict[str, Matrix], list[ShownImage]]:
        """Confusion matrices by encoder, over all pixels of the test images at the masks' own sizes.

        Args:
            image_ids: the test images.
            probes: the trained layers by encoder.
            show: how many images to return for the preview, spread evenly.

        Raises: SourceError where no pixel has a class, or all have the same.
        """
        context, config = self.context, self.config
        classes = len(self.classes.names)
        matrices = {name: np.zeros((classes, classes), np.int64) for name in self.inferences}
        shown: list[ShownImage] = []
        picked = {image_ids[int(i)] for i in np.linspace(0, len(image_ids) - 1, show)}
        prepare = partial(scored_image, classes=self.classes, config=config)
        source = prepared(context.inputs["images"], _COLUMNS, prepare, set(image_ids), problems=self.problems)
        done = 0
        for batch in in_batches(source, context.resources.batch_size or 16):
            for name, inference in self.inferences.items():
                for image, logits in zip(batch, self._logits(batch, inference, probes[name].decoder), strict=True):
                    prediction = largest(logits, *image.truth.shape)
                    matrix = confusion(image.truth, prediction, classes)
                    matrices[name] += matrix
                    if name == "":
                        self.units.add_matrix(image.key, matrix)
                        if image.image_id in picked:
                            shown.append(ShownImage(image.pixels, image.truth, prediction))
            done += len(batch)
            context.report_progress(done, len(image_ids), "test images")
        if not any(matrix.sum() for matrix in matrices.values()):
            raise SourceError(
                f"{context.name}: no pixel of the {len(image_ids)} test images has a class, all is void or unreadable "
                f"({len(self.problems)} unreadable): check ignore_index ({self.classes.ignore_index}) and the masks"
            )
        truth = next(iter(matrices.values())).sum(axis=1)
        require_classes(context.name, f"test images ({config.test_split})", truth, self.classes)
        return matrices, shown

    @torch.inference_mode()
    def _logits(
        self, batch: Sequence[ScoredImage], inference: Inference, decoder: SegmentationDecoder
    ) -> Iterator[torch.Tensor]:
        """The logits of each image, (1, K, h, w). Images of one window are encoded together."""
        if self.config.slide is None:
            for map_Dhw in inference([image.windows[0] for image in batch]).map:
                yield decoder(map_Dhw[None])
            return
        for image in batch:
            yield joined(decoder(inference(image.windows).map), image, self.config.test_size)


def _score_cached(
    decoder: SegmentationDecoder, cache: TrainCache, name: str, rows: NDArray[np.int64], classes: int
) -> Matrix:
    """The confusion matrix over some rows of the cache, at the size of the training labels."""
    matrix = np.zeros((classes, classes), np.int64)
    for row in rows:
        map_Dhw = torch.from_numpy(np.array(cache.maps[name][row])).to(cache.device).float()
        matrix += confusion(cache.labels[row], decoder.predict(map_Dhw, *cache.labels.shape[1:]), classes)
    return matrix
