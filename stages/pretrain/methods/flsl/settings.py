"""What a config says about `flsl`: clusters of features within a view and between views. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.stage import Input, Settings
from stages.models.planned import too_coarse
from stages.pretrain.config.method import MethodSettings, Start
from stages.pretrain.config.parts import Crops, Export, HeadSettings, Range, TeacherSettings, TeacherTemperature


class TeacherCrop(Settings):
    """The crop of the image that the teacher sees. The student's crops are cut from it."""

    size: int = Field(224, gt=0, description="side in pixels; a multiple of the ViT's patch")
    scale: Range = Field((0.8, 1.0), description="area as a fraction of the image's")


class AttentionSettings(Settings):
    """An inverse temperature of the mean-shift. Divided by the root of the width, it multiplies the dot products."""

    end: float = Field(gt=0, description="at the end of the training; divided by sqrt(temperature_width)")
    start: float | None = Field(None, gt=0, description="at the first step, then a cosine to `end`; default: constant")


class QuerySettings(Settings):
    """Which tokens become queries: one of every window. The released code has windows of 3 and 2, not random.

    Source: docs/methods.md#flsl-query-sampling.
    """

    window_global: int = Field(2, ge=1, description="tokens a side of a window, in the student's large crops")
    window_local: int = Field(2, ge=1, description="the same in local crops")
    random: bool = Field(True, description="a random token of each window; false: its top left one")


class PreviousStage(Settings):
    """Multi-stage training: cross-attention is limited to what an earlier, frozen teacher attends to."""

    encoder: Input["encoder"] = Field(description="the earlier teacher")
    sharpness: float = Field(1e4, gt=0, description="of the sigmoid that turns its attention into a mask")
    mixture_bias: float = Field(
        1.0,
        ge=0,
        le=1,
        description="the earlier attention's share at the end; it falls from 1 to this along a cosine, so "
        "that at 1 (the released code's default) the present teacher's attention never counts",
    )


NO_LOCAL_CROPS = {"size": 96, "count": 0, "scale": (0.1, 0.4)}


class FLSLSettings(MethodSettings):
    """FLSL. For the encoder of the paper set `backbone: {class_token: false, pos_embed: sincos}`.

    Source: docs/methods.md#flsl.
    """

    builds: ClassVar[str] = "stages.pretrain.methods.flsl.method:FLSL"
    terms: ClassVar[tuple[str, ...]] = ("intra", "inter", "vmr")
    default_weights: ClassVar[Mapping[str, float]] = {"intra": 0.03, "inter": 1.0, "vmr": 5.0}  # v, eta, gamma

    name: str = "flsl"
    tokens: Literal["paper", "map"] = Field(
        "paper",
        description="paper: the encoder must be a ViT without [CLS] and with fixed sin-cos positions; "
        "map: the cells of whatever feature map the encoder gives, ViT or ResNet",
    )
    teacher_crop: TeacherCrop = TeacherCrop()
    global_crops: Crops = Field(
        Crops(size=224, count=1, scale=(0.5, 1.0)), description="the student's large crops of each teacher crop"
    )
    local_crops: Crops = Field(
        Crops(size=96, count=2, scale=(0.1, 0.4)),
        description="the student's small crops of the teacher crop; scales are of that crop, not of the image",
    )
    two_teacher_views: bool = Field(
        False,
        description="the paper's symmetric form: two teacher crops of one place in different colours, each predicts "
        "the student crops of the other; without local crops. False: the released code's form",
    )
    colours: Literal["either", "sequential"] = Field(
        "either",
        description="either: blur (0.5), or else blur (0.1) and solarise (0.2), as the released code; sequential: blur "
        "(0.5) and then solarise (0.2) in every crop, as the paper: the default with two_teacher_views",
    )
    queries: QuerySettings = QuerySettings()
    self_attention: AttentionSettings = Field(AttentionSettings(end=0.1), description="t_sa, from a token to its mode")
    cross_attention: AttentionSettings = Field(
        AttentionSettings(end=0.2),
        description="t_ca, from a token to its mode in the teacher's crop; below t_sa the "
        "method is reported to collapse",
    )
    temperature_width: int | None = Field(
        None,
        ge=1,
        description="attention's numbers are divided by the root of this; default: the encoder's width; 384 is the "
        "released code's constant",
    )
    head: HeadSettings = HeadSettings(prototypes=4096)
    freeze_last_layer: int = Field(1, ge=0, description="epochs in which the centroids are not trained")
    student_temperature: float = Field(0.1, gt=0)
    teacher_temperature: TeacherTemperature = TeacherTemperature()
    centering: Literal["none", "centre", "sinkhorn"] = Field(
        "none",
        description="of the teacher's assignments. centre: DINO's moving mean; sinkhorn: the paper's ablation (with "
        "weights.vmr 1), a softmax over all queries of the batch, rows then brought to sum 1",
    )
    center_momentum: float = Field(0.9, ge=0, le=1)
    teacher: TeacherSettings = TeacherSettings()
    export: Export = Field("teacher", description="whose encoder is evaluated; teacher as in the official code")
    previous: PreviousStage | None = Field(None, description="multi-stage training")

    def over_one_pass(self) -> tuple[str, ...]:
        """The mean assignment of `vmr`, and Sinkhorn's assignments if there are any."""
        balanced = ("Sinkhorn's assignments",) if self.centering == "sinkhorn" else ()
        return (*balanced, *(("the mean assignment of vmr",) if self.uses("vmr") else ()))

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_form(cls, given: Any) -> Any:
        """The paper's form has other defaults, which are filled in so that a copy of the settings is as they are."""
        if not isinstance(given, dict) or not given.get("two_teacher_views"):
            return given
        return {"local_crops": NO_LOCAL_CROPS, "colours": "sequential", **given}

    @model_validator(mode="after")
    def _consistent(self) -> FLSLSettings:
        if not self.uses("inter"):
            raise ValueError("weights.inter: without it nothing trains the centroids; give it a weight above 0")
        if self.global_crops.count < 1:
            raise ValueError("global_crops.count: the student needs a large crop; give at least 1")
        if self.two_teacher_views and self.local_crops.count:
            raise ValueError("local_crops: two_teacher_views has none; leave them out or set two_teacher_views: false")
        return self

    def view_sizes(self) -> Iterator[tuple[str, int]]:
        """The student's and the teacher's crops; with two teacher views there are no local ones."""
        unused = "local_crops.size" if self.two_teacher_views else ""
        yield from ((path, size) for path, size in super().view_sizes() if path != unused)
        yield "teacher_crop.size", self.teacher_crop.size

    def misfits(self, start: Start) -> Iterator[tuple[str, str, str]]:
        """A window needs cells; with `tokens: paper`, the encoder is a ViT without [CLS] and with fixed positions."""
        yield from super().misfits(start)
        windows = {"global_crops": self.queries.window_global}
        if self.local_crops.count:
            windows["local_crops"] = self.queries.window_local
        for crops, window in windows.items():
            use = f"a window of {window} tokens a side, of which one is a query"
            yield from too_coarse(start.backbone, {f"{crops}.size": getattr(self, crops).size}, window, use)
        backbone, otherwise = start.backbone, "or set method.tokens: map to train on any feature map"
        if self.tokens == "paper" and backbone.is_vit is False:
            yield (
                "tokens",
                f"FLSL clusters the tokens of a ViT, and {backbone.name} is none",
                f"name a ViT, {otherwise}",
            )
        elif self.tokens == "paper" and backbone.is_vit:
            if backbone.class_token:
                yield "tokens", "FLSL's ViT has no [CLS]", f"set backbone.class_token: false, {otherwise}"
            if backbone.pos_embed != "sincos":
                yield "tokens", "FLSL's ViT has fixed positions", f"set backbone.pos_embed: sincos, {otherwise}"
