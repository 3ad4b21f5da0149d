"""Segmentation: which images, crops with their masks, the decoder on the encoder, and the test of whole images.

Shape legend: B images, C classes, H W sides of an image, S side of a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from stages.data.confusion import scores
from stages.data.images import decode
from stages.data.mask_classes import MaskClasses, MaskLabels
from stages.data.pictures import RGB
from stages.data.prepared import prepared, split_error
from stages.data.rows import iter_rows
from stages.data.segmented_test import SegmentedTest, class_table
from stages.data.windows import window_corners
from stages.finetune.data.examples import Example, LabelledBatch, normalised
from stages.finetune.data.placement import Pixels, jittered, mirrored, scaled_crop
from stages.finetune.decoders import FourMaps, SemanticFPN, UPerNet, auxiliary_head, linear_decoder
from stages.finetune.model import FinetunedModel
from stages.finetune.segmentation import SegmentationConfig
from stages.finetune.work import Examples, FinetuneWork, Tested
from stages.models.encoder import Encoder
from stages.models.inference import require_size, squeeze
from stages.training.settings import TrainingConfig

VOID = -1
CROP_TRIES = 10  # crops drawn for `max_class_share` before the last one is taken
WINDOWS = 4  # windows of a test image in one forward pass


class Segmenter(FinetunedModel):
    """A decoder on the encoder; cross-entropy over the pixels that have a class.

    Args:
        encoder: where training starts from.
        classes: C.
        config: of the stage.
    """

    def __init__(self, encoder: Encoder, classes: int, config: SegmentationConfig) -> None:
        super().__init__(encoder, layer_decay=config.layer_decay, batch_norm=config.batch_norm)
        self.maps = self.second = None
        self.decoder: torch.nn.Module
        if config.decoder == "linear":
            self.decoder = linear_decoder(encoder.width, classes, config.dropout)
            return
        self.maps = FourMaps(encoder, config.taps)
        if config.decoder == "fpn":
            self.decoder = SemanticFPN(self.maps.widths, classes, width=config.width or 128, dropout=config.dropout)
        else:
            self.decoder = UPerNet(self.maps.widths, classes, width=config.width or 512, dropout=config.dropout)
            if config.auxiliary:
                self.second = auxiliary_head(self.maps.widths[2], classes, config.dropout)

    def logits(self, images_B3HW: Tensor) -> list[Tensor]:
        """Of the decoder, and of the second head where there is one, (B, C, h, w) each."""
        if self.maps is None:
            return [self.decoder(self.trunk(images_B3HW).map)]
        maps = self.maps(self.trunk, images_B3HW)
        return [self.decoder(maps)] + ([] if self.second is None else [self.second(maps[2])])

    def compute_terms(self, batch: LabelledBatch) -> dict[str, Tensor]:
        """Cross-entropy at the resolution of the masks."""
        labels_BHW = batch.stacked("mask").long()
        names = ("cross_entropy", "auxiliary")
        found = self.logits(batch.images)
        return {name: _cross_entropy(one, labels_BHW) for name, one in zip(names, found, strict=False)}


def _cross_entropy(logits_BChw: Tensor, labels_BHW: Tensor) -> Tensor:
    logits = functional.interpolate(
        logits_BChw.float(), size=tuple(labels_BHW.shape[1:]), mode="bilinear", align_corners=False
    )
    summed = functional.cross_entropy(logits, labels_BHW, ignore_index=VOID, reduction="sum")
    return summed / (labels_BHW != VOID).sum().clamp(min=1)


@dataclass(frozen=True)
class CropWithMask:
    """A crop at a random scale, with its mask."""

    config: SegmentationConfig
    classes: MaskClasses

    def __call__(self, row: dict[str, Any], pixels: Pixels, rng: np.random.Generator) -> Example:
        """The example of a row. Raises ImageError for a mask that does not fit."""
        config, (height, width) = self.config, pixels.shape[:2]
        labels_HW = self.classes.labels(row["mask"], (height, width))
        for _ in range(CROP_TRIES):
            factor = float(rng.uniform(*config.scale)) * config.size / min(width, height)
            crop = scaled_crop(rng, width, height, size=config.size, factor=factor)
            mask = crop.mask(labels_HW, VOID)
            counts = np.bincount(mask[mask >= 0])
            if len(counts) and counts.max() <= config.max_class_share * counts.sum():
                break
        crop = mirrored(crop, rng, config.flip)
        cut = jittered(rng, crop.pixels(pixels), config.colour_jitter)
        return Example(cut, {"mask": crop.mask(labels_HW, VOID)})


class SegmentationWork(FinetuneWork):
    """The `finetune_segmentation` stage on a rank."""

    Config: ClassVar[type[TrainingConfig]] = SegmentationConfig

    @property
    def terms(self) -> dict[str, float]:  # type: ignore[override]
        """The second head's weight."""
        return {"auxiliary": self.settings.auxiliary}

    @property
    def classes(self) -> MaskClasses:
        """Of the images' masks."""
        return MaskClasses.of(self.inputs["images"])

    def examples(self) -> Examples:
        """The train images with a mask."""
        ids = self._masked("train_split", self.settings.train_split)
        return Examples(ids, ["mask"], CropWithMask(self.settings, self.classes))

    def build(self, encoder: Encoder) -> Segmenter:
        """The encoder with its decoder."""
        require_size(encoder, self.settings.size, "size")
        return Segmenter(encoder, len(self.classes.names), self.settings)

    def facts(self) -> dict[str, Any]:
        """The classes, and what the decoder is."""
        config = self.settings
        kept = {name: getattr(config, name) for name in ("decoder", "taps", "width", "auxiliary", "dropout")}
        return {"task": "segmentation", "classes": self.classes.names, **kept}

    def test(self, model: FinetunedModel, device: torch.device) -> Tested:
        """MIoU over the pixels of the test images, at the masks' own size."""
        assert isinstance(model, Segmenter)
        config, images, classes = self.settings, self.inputs["images"], self.classes
        ids = self._masked("test_split", config.test_split)
        problems: list[dict[str, str]] = []

        def read(row: Mapping[str, Any]) -> tuple[int, str, RGB, MaskLabels]:
            pixels = decode(row["image"])
            return row["image_id"], row["key"], pixels, classes.labels(row["mask"], pixels.shape[:2])

        tested = SegmentedTest(classes, ids, config.absent)
        for image_id, key, pixels, truth in prepared(
            images, ["key", "image", "mask"], read, set(ids), problems=problems
        ):
            tested.add(image_id, key, truth, predict(model, pixels, config, device))
        tested.require_classes("fine-tuning", problems)
        result = scores(tested.matrix, config.absent)
        return Tested(
            result.metrics(),
            tested.units,
            class_table(classes, {"": result}, tested.matrix.sum(axis=1)),
            {"test": len(tested.units.names), "classes": len(classes.names), "unusable": len(problems)},
            tested.picture(images),
            problems,
        )

    def _masked(self, option: str, split: str) -> list[int]:
        images = self.inputs["images"]
        rows = iter_rows(images, ["split", "mask"])
        ids = [row["image_id"] for row in rows if row["split"] == split and row["mask"] is not None]
        if not ids:
            raise split_error("fine-tuning", images, split, "a mask", f"set {option} to a split that has")
        return ids


@torch.no_grad()
def predict(model: Segmenter, pixels: RGB, config: SegmentationConfig, device: torch.device) -> NDArray[np.int64]:
    """Class of every pixel, (H, W).

    Args:
        model: in eval mode.
        pixels: of the whole image.
        config: how it is tested.
        device: of the model.
    """
    height, width = pixels.shape[:2]
    factor = (config.test_resize or config.size) / min(height, width)
    h, w = max(1, round(height * factor)), max(1, round(width * factor))
    trunk = model.trunk
    resized = torch.from_numpy(squeeze(pixels, h, w))
    patch = trunk.stride if trunk.is_vit and config.test == "whole" else 1
    image_13HW = normalised([resized], trunk.mean, trunk.std, patch, device)
    if config.test == "slide":
        logits = _slide(model, _enlarged(image_13HW, config.size), config)
    else:
        [logits, *_] = model.logits(image_13HW)
        logits = functional.interpolate(logits.float(), image_13HW.shape[2:], mode="bilinear", align_corners=False)
    logits = functional.interpolate(logits[..., :h, :w], (height, width), mode="bilinear", align_corners=False)
    found: NDArray[np.int64] = logits[0].argmax(0).cpu().numpy()
    return found


def _slide(model: Segmenter, image_13HW: Tensor, config: SegmentationConfig) -> Tensor:
    """Mean of the windows' logits, (1, C, H, W); the last window of a row or column ends at the border."""
    size, stride = config.size, config.test_stride or max(1, config.size * 2 // 3)
    height, width = image_13HW.shape[2:]
    corners = window_corners(height, width, size, stride)
    total: Tensor | None = None
    times = image_13HW.new_zeros(1, 1, height, width)
    for first in range(0, len(corners), WINDOWS):
        some = corners[first : first + WINDOWS]
        windows = torch.cat([image_13HW[..., y : y + size, x : x + size] for y, x in some])
        [logits, *_] = model.logits(windows)
        logits = functional.interpolate(logits.float(), (size, size), mode="bilinear", align_corners=False)
        if total is None:
            total = logits.new_zeros(1, logits.shape[1], height, width)
        for (y, x), one in zip(some, logits, strict=True):
            total[..., y : y + size, x : x + size] += one
            times[..., y : y + size, x : x + size] += 1
    assert total is not None
    return total / times


def _enlarged(image_13HW: Tensor, least: int) -> Tensor:
    """With zeros on the right and below, so that no side is less."""
    height, width = image_13HW.shape[2:]
    return functional.pad(image_13HW, (0, max(0, least - width), 0, max(0, least - height)))
