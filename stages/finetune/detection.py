"""The `finetune_detection` stage: Faster or Mask R-CNN on an encoder, scored by COCO's average precision.

Source: docs/methods.md#fine-tuned-detection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from pipeline.stage import Feed
from stages.data.requirements import Mismatch
from stages.finetune.settings import FinetuneConfig, Range
from stages.finetune.stage import Finetune
from stages.models.planned import backbone_of, undivided

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.store.artifact import Artifact

OF_BOXES, OF_MASKS = ("ap", "ap50", "ap75"), ("ap_mask", "ap50_mask", "ap75_mask")


class DetectionConfig(FinetuneConfig):
    """The detector, the sizes of training images, and the test."""

    batch_size: int = Field(16, ge=1, description="images of one optimiser step, over all ranks and passes")
    masks: bool = Field(False, description="Mask R-CNN, which learns the objects' masks too; else Faster R-CNN")
    cascade: bool = Field(False, description="Cascade R-CNN's three heads in a row; not with neck c4")
    neck: Literal["fpn", "c4", "simple"] | None = Field(
        None,
        description="fpn: four maps of doubling strides; c4: a ResNet's C4 map, and its last stage on every region; "
        "simple: a ViT's last map at four scales; default: fpn or simple, as the encoder is",
    )
    short: Range = Field((480, 800), description="a training image's short side in pixels, any multiple of 32 of these")
    long: int = Field(1333, gt=0, description="its longest side at most, in pixels")
    square: int | None = Field(
        None, gt=0, description="large-scale jitter in place of short and long: scaled into a square of this side"
    )
    scale: Range = Field((0.1, 2.0), description="square: scale of the image, where 1 fits it into the square")
    test_short: int = Field(800, gt=0, description="short side of a test image; with square: its side is that one")
    test_long: int = Field(1333, gt=0, description="its longest side at most")
    anchors: list[int] = Field(
        [32, 64, 128, 256, 512], description="sides of the anchors in pixels; one for each level, or all on C4"
    )
    proposals: int = Field(
        1000, gt=0, description="regions of a test image that are classified at most; in training twice as many"
    )
    regions: int = Field(512, gt=0, description="regions of a training image that the heads learn from")
    detections: int = Field(100, gt=0, description="of a test image at most")

    @model_validator(mode="after")
    def _rules(self) -> DetectionConfig:
        for name in ("short", "scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} {[low, high]} must be positive and rise")
        if self.long < self.short[0] or self.test_long < self.test_short:
            raise ValueError("long, test_long: a longest side may not be less than the short side")
        if self.cascade and self.neck == "c4":
            raise ValueError("cascade: its heads read a pyramid, and neck is c4; leave one of them out")
        if self.neck != "c4" and len(self.anchors) != 5:
            raise ValueError(f"anchors {self.anchors}: one for each of five levels (any number with neck: c4)")
        if min(self.anchors, default=0) <= 0:
            raise ValueError(f"anchors {self.anchors}: give sides in pixels")
        return self


class FinetuneDetection(Finetune[DetectionConfig]):
    """images + encoder -> encoder, with metrics ap, ap50, ap75 in per cent (and *_mask), one row a class."""

    units = dict.fromkeys((*OF_BOXES, *OF_MASKS), "%")
    objectives = dict.fromkeys((*OF_BOXES, *OF_MASKS), "max")
    needs = "objects"
    work = "stages.finetune.detection_work:DetectionWork"
    Config = DetectionConfig

    def mismatches(self, feeds: Mapping[str, Feed]) -> Iterator[Mismatch]:
        """Also a neck that does not fit the encoder."""
        backbone = backbone_of(feeds.get("encoder"))
        yield from super().mismatches(feeds)
        if backbone is None:
            return
        if self.config.neck in ("fpn", "c4") and backbone.is_vit:
            what = f"{self.config.neck} is for ResNets, and {backbone.name} is a ViT"
            yield "neck", what, "name simple, or leave it out"
        if self.config.neck == "simple" and backbone.is_vit is False:
            yield "neck", f"simple is for ViTs, and {backbone.name} is none", "name fpn or c4, or leave it out"
        if self.config.square is not None:
            yield from undivided(backbone, {"square": self.config.square})

    @classmethod
    def resampled(cls, artifact: Artifact, draws: int, seed: int) -> dict[str, NDArray[Any]]:
        """Average precision again on bootstrap samples of the test's images."""
        from stages.finetune.average_precision import resample

        return resample(artifact, draws, seed)
