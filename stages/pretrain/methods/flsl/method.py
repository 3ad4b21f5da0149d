"""FLSL: clusters the tokens of an image around modes, and the modes of all images around centroids.

Source: docs/methods.md#flsl. The equation numbers are the paper's.

Terms: intra (Eq. 8), inter (Eq. 11), vmr (the KL of Eq. 11 and 13). Their default weights are 0.03, 1 and 5. A term of
weight 0 is not computed.

Shape legend: T teacher crops (1, or 2 in the symmetric form), V student crops, B images of this rank, S side of a crop,
N tokens of a crop, Q its queries, R queries of all crops and images, D width of a token, K centroids.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.store.artifact import Artifact
from stages.models.encoder import Encoder, Features
from stages.models.heads import at_least_float32
from stages.pretrain.data.batch import Batch
from stages.pretrain.losses.dino_loss import centred_softmax, moved_center
from stages.pretrain.losses.sinkhorn import sinkhorn
from stages.pretrain.methods.flsl.losses.flsl_loss import inter_view, intra_view, volume
from stages.pretrain.methods.flsl.losses.mean_shift import attend, mean_shift, mixed, sharpened
from stages.pretrain.methods.flsl.query_sampling import sample_queries
from stages.pretrain.methods.flsl.settings import AttentionSettings, FLSLSettings
from stages.pretrain.methods.method import Step
from stages.pretrain.methods.shared.assignments import entropy, usage
from stages.pretrain.methods.shared.teacher import Branch, SelfDistillation, make_head
from stages.pretrain.views.plan import Photometric, ViewPlan, ViewSpec
from stages.training.collectives import all_reduce_max, all_reduce_mean, all_reduce_sum, world_size
from stages.training.schedules import cosine, linear_warmup

HEAD = "clusters"  # the head whose prototypes are the centroids


class FLSL(SelfDistillation):
    """Student and teacher. The student's crops are cut from the teacher's; mean-shift takes the place of [CLS]."""

    center: Tensor  # (K,) moving mean of the teacher's scores; used with `centering: centre` only

    def __init__(self, settings: FLSLSettings, encoder: Encoder) -> None:
        require_usable(encoder, settings)
        student = Branch(encoder, {HEAD: make_head(encoder.width, settings.head)})
        super().__init__(student, settings.teacher, settings.export)
        self.settings = settings
        self.register_buffer("center", torch.zeros(settings.head.prototypes))
        self.previous: Encoder | None = None  # the earlier teacher of multi-stage training
        self._teacher_means: list[Tensor] = []  # of this step's forward passes
        self._watched: dict[str, Tensor] = {}
        self.start_step(Step(0, 1, 1))

    def use_inputs(self, inputs: Mapping[str, Artifact]) -> None:
        """Loads the earlier teacher of multi-stage training, if the settings name one."""
        if self.settings.previous is not None:
            self.previous = Encoder.load(inputs["previous.encoder"]).teacher()

    def train(self, mode: bool = True) -> FLSL:
        """Sets the training mode, except that the earlier teacher always stays in evaluation mode."""
        super().train(mode)
        if self.previous is not None:
            self.previous.eval()
        return self

    def view_plan(self) -> ViewPlan:
        """A crop for the teacher, and the student's crops cut from it; no flips.

        Source: docs/methods.md#flsl-views.
        """
        settings = self.settings
        teacher, globals_, locals_ = settings.teacher_crop, settings.global_crops, settings.local_crops
        colour = Photometric(
            jitter=(0.4, 0.4, 0.2, 0.1),
            jitter_p=0.8,
            gray_p=0.2,
            blur_p=0.5,
            solarize_p=0.2,
            blur_else_solarize_p=0.5 if settings.colours == "either" else None,
        )

        def inside(name: str, size: int, count: int, scale: tuple[float, float]) -> ViewSpec:
            return ViewSpec(name, size, count, scale, photometric=colour, parent="teacher")

        views = [ViewSpec("teacher", teacher.size, 1, teacher.scale, photometric=colour)]
        if settings.two_teacher_views:
            # All of the first teacher crop again, in other colours.
            again = ViewSpec("teacher_again", teacher.size, 1, (1, 1), (1, 1), photometric=colour, parent="teacher")
            views += [again, inside("global", globals_.size, 2 * globals_.count, globals_.scale)]
        else:
            views.append(inside("global", globals_.size, globals_.count, globals_.scale))
            if locals_.count:
                views.append(inside("local", locals_.size, locals_.count, locals_.scale))
        return ViewPlan(tuple(views))

    def start_step(self, step: Step) -> None:
        """Sets the teacher's temperature, both attention scales and the share of the present attention."""
        settings, teacher = self.settings, self.settings.teacher_temperature
        self.temperature = linear_warmup(step.epoch, teacher.start, teacher.end, teacher.epochs)
        self.self_scale = _scheduled(settings.self_attention, step)
        self.cross_scale = _scheduled(settings.cross_attention, step)
        if settings.previous is not None:
            self.present_share = cosine(step.index, step.total, 0.0, 1 - settings.previous.mixture_bias)
        self._teacher_means = []

    # -- terms -----------------------------------------------------------------------------------------------

    def compute_terms(self, batch: Batch) -> dict[str, Tensor]:
        """The terms that have a weight: query tokens, then their modes, then the modes' centroids."""
        student = self.student_features(batch)
        teacher = self._teacher_tokens(batch, self.teacher.encoder)
        index = self._sample(batch, student)
        earlier = self._previous_attention(batch, index)
        query_RD, mode_RD, positive_RD = self._cluster(student, teacher, index, earlier)

        log_p_RK = torch.log_softmax(self.student.head(HEAD)(mode_RD) / self.settings.student_temperature, dim=-1)
        with torch.no_grad():
            targets_RK = self._assign(self.teacher.head(HEAD)(positive_RD))
        terms: dict[str, Tensor] = {}
        if self.settings.uses("intra"):
            terms["intra"] = intra_view(query_RD, mode_RD).mean()
        terms["inter"] = inter_view(log_p_RK, targets_RK).mean()
        if self.settings.uses("vmr"):
            # The mean over all queries of all crops, images and ranks is taken before the logarithm. The symmetric form
            # is the mean of two losses, so each half of the student's crops has its own mean. Every rank computes the
            # same value from the mean; so the gradient through it is the local one, unchanged.
            mean_TK = all_reduce_mean(log_p_RK.exp().reshape(len(teacher), -1, log_p_RK.shape[1]).mean(dim=1))
            terms["vmr"] = volume(mean_TK).mean()
        return terms

    def _cluster(
        self, student: list[Features], teacher: list[Tensor], index: list[Tensor], earlier: list[Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, their modes in their own crop (Eq. 4) and in the teacher's (Eq. 12, no gradient): (R, D) each."""
        queries, modes, positives = [], [], []
        width = student[0].map.shape[1]
        with torch.autocast(student[0].map.device.type, enabled=False):
            for v, (crop, index_BQ) in enumerate(zip(student, index, strict=True)):
                tokens_BND = at_least_float32(crop.tokens_BND)
                query_BQD = _rows(tokens_BND, index_BQ)
                queries.append(query_BQD)
                modes.append(mean_shift(query_BQD, tokens_BND, self._over_root(self.self_scale, width)))
                with torch.no_grad():
                    keys_BND = self._seen_by_teacher(teacher, v)
                    attention_BQN = attend(query_BQD, keys_BND, self._over_root(self.cross_scale, width))
                    if earlier is not None:
                        attention_BQN = mixed(attention_BQN, earlier[v], self.present_share)
                    positives.append(torch.bmm(attention_BQN, keys_BND))
        query_RD, mode_RD, positive_RD = (
            torch.cat([rows.flatten(0, 1) for rows in each]) for each in (queries, modes, positives)
        )
        return query_RD, mode_RD, positive_RD

    def _assign(self, scores_RK: Tensor) -> Tensor:
        """The teacher's distribution over centroids, P_t."""
        centering = self.settings.centering
        if centering == "sinkhorn":
            targets_RK = sinkhorn(
                scores_RK,
                epsilon=self.temperature,
                iterations=1,
                all_reduce=all_reduce_sum,
                all_reduce_max=all_reduce_max,
            )
        else:
            targets_RK = centred_softmax(scores_RK, self.center, self.temperature)  # with "none" the centre stays 0
        if centering == "centre":
            self._teacher_means.append(scores_RK.mean(dim=0))
        self._watched.update(teacher_entropy=entropy(targets_RK), prototype_usage=usage(targets_RK))
        return targets_RK

    # -- pieces ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _teacher_tokens(self, batch: Batch, encoder: Encoder) -> list[Tensor]:
        """An encoder's tokens of each teacher crop, (B, N, D) each, from one forward pass."""
        names = [name for name in ("teacher", "teacher_again") if name in batch.views]
        crops_TB3SS = torch.cat([batch.views[name] for name in names])
        tokens = at_least_float32(encoder(crops_TB3SS.flatten(0, 1)).tokens_BND)
        return list(tokens.chunk(len(crops_TB3SS)))

    def _sample(self, batch: Batch, student: list[Features]) -> list[Tensor]:
        """Which tokens of each student crop are queries, (B, Q) each."""
        queries = self.settings.queries
        is_global = [name == "global" for name in ("global", "local") for _ in batch.views.get(name, ())]
        windows = [queries.window_global if large else queries.window_local for large in is_global]
        crops = [(crop.map.shape[-1], window) for crop, window in zip(student, windows, strict=True)]
        return sample_queries(batch, crops, random=queries.random)

    @torch.no_grad()
    def _previous_attention(self, batch: Batch, index: list[Tensor]) -> list[Tensor] | None:
        """Multi-stage training: a mask (B, Q, N) for each student crop; None if there is no earlier teacher.

        It marks what the query tokens attend to, in the teacher crop, by the features of the earlier teacher.
        """
        settings = self.settings.previous
        if settings is None:
            return None
        if self.previous is None:
            raise ValueError("method.previous: the earlier encoder was not handed over (Method.use_inputs)")
        teacher = self._teacher_tokens(batch, self.previous)
        student = Branch(self.previous, {}).encode(batch.views[n] for n in ("global", "local") if n in batch.views)
        scale = self._over_root(self.cross_scale, teacher[0].shape[-1])
        masks = []
        with torch.autocast(teacher[0].device.type, enabled=False):
            for v, (crop, index_BQ) in enumerate(zip(student, index, strict=True)):
                keys_BND = self._seen_by_teacher(teacher, v)
                query_BQD = _rows(at_least_float32(crop.tokens_BND), index_BQ)
                masks.append(sharpened(attend(query_BQD, keys_BND, scale), settings.sharpness))
        return masks

    def _seen_by_teacher(self, teacher: list[Tensor], v: int) -> Tensor:
        """The teacher crop that gives the targets of student crop v.

        In the symmetric form the second teacher crop serves the first half of the student's crops, and the reverse.
        """
        return teacher[(v // self.settings.global_crops.count + 1) % len(teacher)]

    def _over_root(self, scale: float, width: int) -> float:
        """t_sa or t_ca divided by the root of the width, with which dot products of layer-normed tokens grow."""
        return scale / (self.settings.temperature_width or width) ** 0.5

    def before_update(self, step: Step) -> None:
        """Drops the gradients of the centroids in the first epochs (`freeze_last_layer`)."""
        if step.epoch < self.settings.freeze_last_layer:
            self.student.head(HEAD).drop_last_layer_gradients()

    def after_step(self, step: Step) -> None:
        """Moves the teacher, and with `centering: centre` the centre of its scores."""
        super().after_step(step)
        if self._teacher_means:  # only now, because this step's targets used the old centre
            mean_K = all_reduce_sum(torch.stack(self._teacher_means).mean(dim=0)) / world_size()
            self.center.copy_(moved_center(self.center, mean_K, self.settings.center_momentum))
            self._teacher_means = []

    def diagnostics(self) -> dict[str, float]:
        """Entropy of the teacher's assignments and the share of centroids in use."""
        return {name: value.item() for name, value in self._watched.items()}


def require_usable(encoder: Encoder, settings: FLSLSettings) -> None:
    """Checks that FLSL can use this encoder, and that the windows of queries fit the crops.

    Raises:
        ValueError: if `tokens` is "paper" and the encoder is not a ViT without [CLS] and with fixed positions, or if a
            window is larger than a crop's grid of tokens.
    """
    if settings.tokens == "paper":
        otherwise = "or set method.tokens: map to train on any feature map"
        if not encoder.is_vit:
            raise ValueError(
                f"FLSL clusters the tokens of a ViT: set backbone.name ({encoder.backbone.name}) to one, {otherwise}"
            )
        if encoder.model.has_class_token:
            raise ValueError(f"FLSL's ViT has no [CLS]: set backbone.class_token: false, {otherwise}")
        if encoder.backbone.pos_embed != "sincos":
            raise ValueError(f"FLSL's ViT has fixed positions: set backbone.pos_embed: sincos, {otherwise}")
    queries, crops = settings.queries, [("global", settings.global_crops, settings.queries.window_global)]
    if settings.local_crops.count:
        crops.append(("local", settings.local_crops, queries.window_local))
    for name, crop, window in crops:
        grid = -(-crop.size // encoder.stride)
        if grid < window:
            raise ValueError(
                f"method.queries.window_{name}: a window of {window} tokens a side does not fit the {grid} x {grid} "
                f"tokens of a crop of {crop.size} pixels: lower it or raise method.{name}_crops.size"
            )


def _scheduled(attention: AttentionSettings, step: Step) -> float:
    """The attention's inverse temperature at a step."""
    if attention.start is None:
        return attention.end
    return cosine(step.index, step.total, attention.start, attention.end)


def _rows(tokens_BND: Tensor, index_BQ: Tensor) -> Tensor:
    """The tokens at these places, (B, Q, D)."""
    return tokens_BND.gather(1, index_BQ[..., None].expand(-1, -1, tokens_BND.shape[-1]))
