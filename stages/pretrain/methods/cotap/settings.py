"""What a config says about `cotap`: alignment, concentration and prototype terms. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.stage import Input, Settings
from stages.models.planned import too_coarse
from stages.pretrain.config.method import MethodSettings, Start
from stages.pretrain.config.parts import Crops, DenseSettings, Export, HeadSettings, TeacherSettings


class RankingSettings(Settings):
    """The concentration of patches, term sc_patch.

    Source: docs/methods.md#cotap-ranking-loss (Eq. 2 and 12).
    """

    loss: Literal["cotap", "bce"] = Field("cotap", description="bce: the paper's ablation baseline (Eq. 8)")
    pairs: Literal["cross_view", "same_view"] = Field(
        "cross_view",
        description="cross_view: online view 1 against target view 2, both RoIAligned to their overlap (n = grid^4); "
        "same_view: online and target of view 1, whole maps",
    )
    feature: Literal["head", "backbone"] = Field(
        "head", description="what similarities are of: the dense head's unit embedding, or the encoder's map"
    )
    similarity_range: Literal["unit", "cosine"] = Field(
        "unit", description="unit: 0.5 cos + 0.5, in [0, 1] (the printed range); cosine: the raw cosine"
    )
    tau1: float = Field(-0.2, description="teacher similarities below it have no weight")
    tau2: float = Field(0.5, gt=0, description="margin of the surrogate, in units of similarity")


class FilterSettings(Settings):
    """The object-aware filter.

    Source: docs/methods.md#cotap-object-aware-filter.
    """

    placement: Literal["post", "pre_last"] = Field(
        "post", description="post: after the final norm, the encoder's map grows by its width; pre_last: ViT only"
    )
    prototypes: int = Field(64, gt=0, description="M, the learned object prototypes")
    heads: int | None = Field(
        None, gt=0, description="default: the ViT's own number; 1 is the literal single-head form"
    )
    out_projection: bool = Field(True, description="a linear layer after the attention")
    temperature: float = Field(0.1, gt=0, description="tau3, of the prototype term")


class CoTAPSettings(MethodSettings):
    """CoTAP: a second stage of pre-training, started from a pre-trained encoder.

    Source: docs/methods.md#cotap.
    """

    builds: ClassVar[str] = "stages.pretrain.methods.cotap.method:CoTAP"
    terms: ClassVar[tuple[str, ...]] = ("align_patch", "align_image", "sc_patch", "sc_image", "proto")

    name: str = "cotap"
    neighbors: Input["neighbors"] | None = Field(None, description="k-NN table of the images, for sc_image")
    global_crops: Crops = Crops(size=224, count=2, scale=(0.25, 1.0))
    local_crops: Crops = Crops(size=96, count=4, scale=(0.05, 0.25))
    flip: float = Field(0.0, ge=0, le=1, description="probability of a horizontal flip; regions are mirrored back")
    image_head: HeadSettings = HeadSettings(prototypes=4096)
    dense_head: HeadSettings = HeadSettings(prototypes=300)
    literal_feature_softmax: bool = Field(
        False, description="the head's embedding itself as the logits, as printed, instead of scores of prototypes"
    )
    dense: DenseSettings = DenseSettings()
    ranking: RankingSettings = RankingSettings()
    filter: FilterSettings | None = FilterSettings()
    teacher: TeacherSettings = TeacherSettings(momentum=0.9997)
    export: Export = Field("student", description="whose encoder is evaluated; the paper's is the online branch")

    def over_one_pass(self) -> tuple[str, ...]:
        """Every term compares images or balances over them."""
        proto = ("the images that prototypes are compared with",) if self.uses("proto") else ()
        return ("Sinkhorn's assignments", "pairs of images", *proto)

    @model_validator(mode="after")
    def _terms_have_what_they_need(self) -> CoTAPSettings:
        if self.uses("sc_image") and self.neighbors is None:
            raise ValueError(
                "neighbors: the term sc_image needs a k-NN table; name a stage of kind neighbors, "
                "or set weights.sc_image to 0"
            )
        if self.global_crops.count < 2:
            raise ValueError("global_crops.count: CoTAP compares two global views; give at least 2")
        if not any(self.uses(term) for term in self.terms):
            raise ValueError("weights: every term weighs 0; give at least one a weight")
        return self

    def uses(self, term: str) -> bool:
        """Whether a term has a weight and, for `proto`, there is a filter. Other terms are not computed."""
        return super().uses(term) and (term != "proto" or self.filter is not None)

    def least_batch(self) -> int:
        """2 for the ranking of pairs of images, else 1."""
        return 2 if self.uses("sc_patch") else 1

    def misfits(self, start: Start) -> Iterator[tuple[str, str, str]]:
        """Terms of patches need some, and a filter before a ViT's last block needs a ViT."""
        yield from super().misfits(start)
        if self.uses("align_patch") or self.uses("sc_patch"):
            sizes = {"global_crops.size": self.global_crops.size}
            yield from too_coarse(start.backbone, sizes, 2, "terms of patches")
        if self.filter is not None and self.filter.placement == "pre_last" and start.backbone.is_vit is False:
            what = f"pre_last needs a ViT's last block, and {start.backbone.name} has none"
            yield "filter.placement", what, "set it to post, or name a ViT"
