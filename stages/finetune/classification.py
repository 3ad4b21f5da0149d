"""The `finetune_classification` stage: an encoder trained with a linear layer on labels, scored by top-1 and top-5.

Source: docs/methods.md#fine-tuned-classification.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stages.finetune.settings import FinetuneConfig, Range
from stages.finetune.stage import Finetune


class ClassificationConfig(FinetuneConfig):
    """Crops, the share of labels, and the linear layer."""

    size: int = Field(224, gt=0, description="side in pixels of a training crop and of the test's central crop")
    test_resize: int | None = Field(
        None, gt=0, description="short side of a test image before its central crop; default: size / 0.875"
    )
    crop_scale: Range = Field((0.08, 1.0), description="area of a training crop as a fraction of the image's")
    crop_ratio: Range = Field((3 / 4, 4 / 3), description="width over height of a training crop in the image")
    pooling: Literal["vector", "mean"] = Field("vector", description="what the encoder gives, or the mean of patches")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    label_fraction: float = Field(
        1.0, gt=0, le=1, description="share of the train images of each class that is learnt from, at least one"
    )
    label_seed: int = Field(
        0, ge=0, description="which train images these are; a smaller share is part of a larger one"
    )

    @property
    def resize(self) -> int:
        """Short side of a test image."""
        return self.test_resize or round(self.size / 0.875)

    @model_validator(mode="after")
    def _rules(self) -> ClassificationConfig:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale {list(self.crop_scale)} must rise within (0, 1]")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio {list(self.crop_ratio)} must be positive and rise")
        if self.resize < self.size:
            raise ValueError(f"test_resize: {self.resize} is less than size {self.size}, the side of the crop from it")
        return self


class FinetuneClassification(Finetune[ClassificationConfig]):
    """images + encoder -> encoder, with metrics top1, top5 in per cent, one row a test image."""

    units = dict.fromkeys(("top1", "top5"), "%")
    objectives = dict.fromkeys(("top1", "top5"), "max")
    work = "stages.finetune.classification_work:ClassificationWork"
    sizes = ("size",)
    Config = ClassificationConfig

    def learnt_from(self, images: int | None) -> int | None:
        """The share of labels."""
        return None if images is None else max(1, round(images * self.config.label_fraction))
