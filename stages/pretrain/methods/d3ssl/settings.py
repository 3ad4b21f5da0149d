"""What a config says about `d3ssl`: contrast of proposals, de-coupled and de-positioned. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.stage import Input, Settings
from stages.models.planned import too_coarse
from stages.pretrain.config.method import MethodSettings, QueueSize, Start
from stages.pretrain.config.parts import Export, Range, TeacherSettings


class CutoutSettings(Settings):
    """PRC, the proposal-based random cutout.

    Source: docs/methods.md#d3ssl-region-augmentations.
    """

    kind: Literal["proposal", "random", "none"] = Field(
        "proposal", description="random: SoCo's, squares cut from half of the boxes (Table 5); none: no cutout"
    )
    ratio: Range = Field((0.2, 0.5), description="proposal: fraction of a box's area that is cut")
    threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="proposal: a box of which larger ones cut more than this is restored before its own cut; "
        "default: the ratio drawn for that box (the successor's rule; the paper gives no number)",
    )


class MaskSettings(Settings):
    """PRM, the proposal-based random mask.

    Source: docs/methods.md#d3ssl-region-augmentations.
    """

    kind: Literal["reveal", "erase", "none"] = Field(
        "reveal",
        description="reveal: the boxes and one rectangle at each one's edge stay, all else is filled; erase: only "
        "those rectangles are filled, outside the boxes (the paper's text allows both readings); none: no mask",
    )
    scale: Range = Field((0.2, 0.6), description="area of a rectangle as a fraction of its box's")
    aspect: Range = Field((3 / 4, 4 / 3), description="width / height of a rectangle")


class JitterSettings(Settings):
    """RBJ, the restricted box jitter; drawn anew for every view.

    Source: docs/methods.md#d3ssl-region-augmentations.
    """

    kind: Literal["restricted", "contained", "plain", "none"] = Field(
        "restricted",
        description="restricted: never larger than the box; contained: nor outside of it; plain: SoCo's, larger or "
        "smaller (Table 5); none: the boxes as they are",
    )
    ratio: float = Field(0.1, ge=0, lt=1, description="of the box's sides, for scaling and for the shift")


class RegionHead(Settings):
    """The projector of a region: a hidden layer with batch norm and ReLU, an output layer, l2-normalisation."""

    hidden: int = Field(4096, gt=0)
    out: int = Field(256, gt=0)


class BankSettings(Settings):
    """Negatives: the teacher's regions of past batches, first in, first out, the same on all ranks."""

    size: int = Field(65536, ge=1, description="regions kept; of a batch with more of them, the last ones")
    holds: Literal["both", "masked"] = Field(
        "both", description="both: the teacher's regions of both of its views; masked: of the cut and masked one only"
    )


class D3SSLSettings(MethodSettings):
    """D3SSL. Without the term deposition (`weights: {deposition: 0}`) it is the baseline of the paper's Table 7.

    Source: docs/methods.md#d3ssl.
    """

    builds: ClassVar[str] = "stages.pretrain.methods.d3ssl.method:D3SSL"
    terms: ClassVar[tuple[str, ...]] = ("decouple", "deposition")

    name: str = "d3ssl"
    boxes: Input["boxes"] | list[Input["boxes"]] = Field(
        description="proposals of the images; with several image sources, one stage for each"
    )
    size: int = Field(224, gt=0, description="side of both full views in pixels; a multiple of the encoder's stride")
    small_size: int = Field(112, gt=0, description="side of the second view's smaller copy; divides `size`")
    crop_scale: Range = Field((0.4, 1.0), description="area of the second view as a fraction of the image's")
    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip; boxes are mirrored with it")
    proposals: int = Field(4, ge=1, description="K, boxes an image and step; fewer common to both views are repeated")
    min_side: float = Field(16.0, ge=1, description="a box that keeps less of this on a side is not in a view; pixels")
    cutout: CutoutSettings = CutoutSettings()
    mask: MaskSettings = MaskSettings()
    jitter: JitterSettings = JitterSettings()
    fill: float = Field(0.0, description="normalised value of what is cut or masked; 0 is the mean colour")
    roi_size: int = Field(14, ge=1, description="side of RoIAlign's output; a ResNet's last stage halves it (SoCo: 7)")
    head: RegionHead = RegionHead()
    temperature: float = Field(0.2, gt=0)
    bank: BankSettings = BankSettings()
    teacher: TeacherSettings = TeacherSettings(momentum=0.99)
    export: Export = Field(
        "student", description="whose encoder is evaluated; student as in MoCo and SoCo, whose recipes D3SSL follows"
    )

    @model_validator(mode="after")
    def _consistent(self) -> D3SSLSettings:
        if self.size % self.small_size:
            raise ValueError(f"small_size: {self.small_size} does not divide size {self.size}")
        if not any(self.uses(term) for term in self.terms):
            raise ValueError("weights: every term weighs 0; give at least one a weight")
        return self

    def over_one_pass(self) -> tuple[str, ...]:
        """The images that regions are pasted onto; the negatives are earlier batches'."""
        return ("the backgrounds of deposition",) if self.uses("deposition") else ()

    def least_batch(self) -> int:
        """2 for the term that pastes regions onto another image of the batch, else 1."""
        return 2 if self.uses("deposition") else 1

    def queues(self) -> dict[str, QueueSize]:
        """The bank of regions, which takes those of one or of both views of the teacher."""
        views = 2 if self.bank.holds == "both" else 1
        return {"bank.size": QueueSize(self.bank.size, of_an_image=self.proposals * views)}

    def view_sizes(self) -> Iterator[tuple[str, int]]:
        """Both sizes."""
        yield from super().view_sizes()
        yield "small_size", self.small_size

    def misfits(self, start: Start) -> Iterator[tuple[str, str, str]]:
        """A map of one cell, whose regions are all alike. A ResNet's regions are of its C4 map."""
        yield from super().misfits(start)
        if not start.backbone.is_resnet:
            yield from too_coarse(start.backbone, dict(self.view_sizes()), 2, "the features of regions")

    def no_host_with(self, start: Start) -> str | None:
        """Of a ResNet it trains regions of the C4 map, and computes no vector of a whole view."""
        if not start.backbone.is_resnet:
            return None
        return f"d3ssl takes regions of the C4 map of {start.backbone.name}, and dsa compares vectors of whole views"
