"""What a config says about `vice`: clustering of the superpixels that several views share. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.stage import Input, Settings
from stages.pretrain.config.method import MethodSettings, Start
from stages.pretrain.config.parts import Range
from stages.training.settings import weight_of


class StandardSettings(Settings):
    """The standardised image that views are cut from. The superpixels are those of the stored image.

    Source: docs/methods.md#vice-standard-image.
    """

    kind: Literal["pad", "square"] = Field(
        "pad",
        description="pad: enlarged until the longer side is `size`, the shorter side padded with black to it "
        "(high-res recipe); square: the middle square, scaled to `size` (low-res recipe, 320)",
    )
    size: int = Field(500, ge=1, description="pixels")
    longest: int = Field(2048, ge=1, description="pad: larger images are shrunk to this")


class RegionMaskSettings(Settings):
    """Masking of regions with noise.

    Source: docs/methods.md#vice-region-masking.
    """

    ratio: float = Field(0.25, ge=0, le=1, description="largest side of the rectangle, of the view's; 0: no masking")
    protected: float = Field(0.25, ge=0, le=1, description="share of the common regions that are never masked")
    centre: Literal["view", "nominal"] = Field(
        "view",
        description="what the rectangle's distance from the middle is drawn from: the view's extent in the "
        "image; nominal: `size`, as in the official code, whatever the view was resized from",
    )


class ConceptQueueSettings(Settings):
    """Embeddings of earlier first views, which Sinkhorn balances assignments over too."""

    size: int = Field(160_000, ge=0, description="regions, of all ranks together (paper: 5000 on each of 32 GPUs)")
    start: int = Field(313, ge=0, description="optimiser steps before it is used")


class ViCEDecoderSettings(Settings):
    """The decoder on the backbone's levels; dropped after training.

    Source: docs/methods.md#vice-network.
    """

    name: Literal["fpn", "deeplab"] = Field(
        "deeplab", description="deeplab: DeepLabV3+ (high-res recipe); fpn: PiCIE's pyramid (low-res recipe)"
    )
    width: int = Field(128, gt=0, description="D, of the embedding of a pixel")


class ViCESettings(MethodSettings):
    """ViCE. Defaults are those of the paper's high-resolution model; the released configs differ.

    Source: docs/methods.md#vice.
    """

    builds: ClassVar[str] = "stages.pretrain.methods.vice.method:ViCE"
    terms: ClassVar[tuple[str, ...]] = ("swapped", "coherence")

    name: str = "vice"
    superpixels: Input["superpixels"] | list[Input["superpixels"]] | None = Field(
        None,
        description="the regions; with several image sources, one stage for each; for the grid ablation from a "
        "superpixels stage with `algorithm: grid`",
    )
    decomposition: Literal["superpixels", "pixels"] = Field(
        "superpixels", description="pixels: every pixel is a region of its own (the ablation); needs no superpixels"
    )
    standard: StandardSettings = StandardSettings()
    views: int = Field(5, ge=2, description="the first around a point with much content, the others around the first")
    size: int = Field(512, gt=0, description="side of a view in pixels; a multiple of a ViT's patch")
    resize: Range = Field(
        (0.5, 2.0), description="side of the cut-out as a multiple of `size`; released configs (0.5, 1.5)"
    )
    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip, of each view")
    mask: RegionMaskSettings = RegionMaskSettings()
    drop_region_zero: bool = Field(False, description="never use an image's region 0, as the official pooling does")
    decoder: ViCEDecoderSettings = ViCEDecoderSettings()
    prototypes: int = Field(128, gt=0, description="K, the visual concepts")
    frozen_steps: int = Field(313, ge=0, description="optimiser steps in which the prototypes are not trained")
    region: Literal["mean", "representative"] = Field(
        "mean",
        description="what stands for a region: the mean of its pixels; representative: its pixel with the highest "
        "score, and the term coherence draws the others to it (released COCO configs)",
    )
    pool_order: Literal["mean_then_norm", "norm_then_mean"] = Field(
        "mean_then_norm", description="the code's order; norm_then_mean is the paper's, not brought back to length 1"
    )
    loss_mean: Literal["regions", "per_image"] = Field(
        "regions", description="over all regions of the batch alike (the code), or over each image's first (Eq. 3)"
    )
    temperature: float = Field(0.1, gt=0, description="of the predicting views' softmax")
    epsilon: float = Field(0.05, gt=0, description="of Sinkhorn on the first view's scores")
    iterations: int = Field(3, ge=1, description="of Sinkhorn")
    queue: ConceptQueueSettings = ConceptQueueSettings()

    @model_validator(mode="after")
    def _consistent(self) -> ViCESettings:
        if (not self.superpixels) != (self.decomposition == "pixels"):
            raise ValueError(
                "superpixels: name a stage of kind superpixels made from the images"
                if not self.superpixels
                else "superpixels: decomposition pixels needs none; remove one of the two"
            )
        if not 0 < self.resize[0] <= self.resize[1]:
            raise ValueError(f"resize: {list(self.resize)} must be two numbers above 0, the smaller first")
        if self.region == "representative" and self.pool_order != "mean_then_norm":
            raise ValueError("pool_order: a representative is one pixel, nothing is pooled; remove one of the two")
        return self

    def term_weights(self) -> dict[str, float]:
        """With representatives, both terms weigh 1/2 by default (released configs); else there is no coherence."""
        if self.region == "mean":
            return {"swapped": weight_of(self.weights, "swapped")}
        return {term: self.weights.get(term, 0.5) for term in self.terms}

    def over_one_pass(self) -> tuple[str, ...]:
        """Assignments are balanced over the regions of a pass and the queue; with `regions` all of them weigh alike."""
        weighed = ("the mean over regions",) if self.loss_mean == "regions" else ()
        return ("Sinkhorn's assignments of regions", *weighed)

    def as_host(self) -> ViCESettings:
        """Refuses: the backbone's levels go to the decoder, and nothing computes the vector that DSA compares.

        Raises:
            ValueError: always.
        """
        raise ValueError("vice trains a backbone's levels and makes no vector of a view, so dsa has nothing to compare")

    def misfits(self, start: Start) -> Iterator[tuple[str, str, str]]:
        """A filter sees none of the backbone's levels that ViCE trains."""
        yield from super().misfits(start)
        if start.filtered:
            what = "vice trains the backbone's levels, which the object-aware filter of init does not see"
            yield "name", what, "name an init without a filter"
