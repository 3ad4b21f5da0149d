"""DINO: every crop of an image predicts the teacher's distribution for the image's other global crops.

Source: docs/methods.md#dino.

Shape legend: V crops (G global first), B images of this rank, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.models.encoder import Encoder, Features
from stages.models.heads import ProjectionHead
from stages.pretrain.data.batch import Batch
from stages.pretrain.losses.dino_loss import centred_softmax, dino_loss, moved_center
from stages.pretrain.losses.sinkhorn import sinkhorn
from stages.pretrain.methods.dino.settings import DinoSettings
from stages.pretrain.methods.method import Step
from stages.pretrain.methods.shared.assignments import entropy, usage
from stages.pretrain.methods.shared.colours import crop_colours
from stages.pretrain.methods.shared.teacher import Branch, SelfDistillation, make_head
from stages.pretrain.views.plan import ViewPlan, ViewSpec
from stages.training.collectives import all_reduce_max, all_reduce_sum, world_size
from stages.training.schedules import linear_warmup


class Dino(SelfDistillation):
    """Student and teacher with one head on the image's vector. Term: align_image."""

    center: Tensor  # (K,) moving mean of the teacher's scores
    min_overlap = (0.0, 0.0)  # of two global crops; of a local and a global one; as fractions of the image's area

    def __init__(
        self, settings: DinoSettings, encoder: Encoder, heads: dict[str, ProjectionHead] | None = None
    ) -> None:
        image_head = make_head(encoder.vector_width, settings.head)
        super().__init__(Branch(encoder, {"image": image_head, **(heads or {})}), settings.teacher, settings.export)
        self.settings = settings
        self.register_buffer("center", torch.zeros(settings.head.prototypes))
        self.temperature = settings.teacher_temperature.start
        self._teacher_means: list[Tensor] = []  # of this step's forward passes
        self._watched: dict[str, Tensor] = {}

    def view_plan(self) -> ViewPlan:
        """Global crops and smaller local ones, all of the whole image."""
        return multi_crop(self.settings, self.min_overlap)

    def start_step(self, step: Step) -> None:
        """Sets the teacher's temperature for the step's epoch."""
        schedule = self.settings.teacher_temperature
        self.temperature = linear_warmup(step.epoch, schedule.start, schedule.end, schedule.epochs)
        self._teacher_means = []

    def compute_terms(self, batch: Batch) -> dict[str, Tensor]:
        """align_image: the teacher sees the global crops, the student all of them."""
        return {"align_image": self.align_image(self.student_features(batch), self.teacher_features(batch))}

    def align_image(self, student: list[Features], teacher: list[Features]) -> Tensor:
        """Cross-entropy of every student crop against the teacher's distribution of every other global crop (Eq. 3)."""
        with torch.no_grad():
            teacher_GBK = self.teacher.head("image")(torch.stack([crop.vector for crop in teacher]))
            targets_GBK = self._targets(teacher_GBK)
            self._teacher_means.append(teacher_GBK.mean(dim=(0, 1)))
            self._watched.update(teacher_entropy=entropy(targets_GBK), prototype_usage=usage(targets_GBK))
        student_VBK = self.student.head("image")(torch.stack([crop.vector for crop in student]))
        return dino_loss(student_VBK, targets_GBK, temperature=self.settings.student_temperature).mean()

    def _targets(self, teacher_GBK: Tensor) -> Tensor:
        if self.settings.centering == "centre":
            return centred_softmax(teacher_GBK, self.center, self.temperature)
        crops = [
            sinkhorn(scores_BK, epsilon=self.temperature, all_reduce=all_reduce_sum, all_reduce_max=all_reduce_max)
            for scores_BK in teacher_GBK
        ]
        return torch.stack(crops)

    def before_update(self, step: Step) -> None:
        """Drops the gradients of the head's prototypes in the first epochs (`freeze_last_layer`)."""
        if step.epoch < self.settings.freeze_last_layer:
            self.student.head("image").drop_last_layer_gradients()

    def after_step(self, step: Step) -> None:
        """Moves the teacher, then the centre, by the mean of the teacher's scores on all ranks."""
        super().after_step(step)
        if self._teacher_means:  # only now, because this step's targets used the old centre
            mean_K = all_reduce_sum(torch.stack(self._teacher_means).mean(dim=0)) / world_size()
            self.center.copy_(moved_center(self.center, mean_K, self.settings.center_momentum))
            self._teacher_means = []

    def diagnostics(self) -> dict[str, float]:
        """Entropy of the teacher's assignments and the share of prototypes in use."""
        return {name: value.item() for name, value in self._watched.items()}


def multi_crop(settings: DinoSettings, min_overlap: tuple[float, float]) -> ViewPlan:
    """DINO's crops and colours. The first global crop is always blurred; the others rarely, but sometimes solarised.

    Source: docs/methods.md#dino.

    Args:
        settings: sizes, numbers and scales of the crops.
        min_overlap: of two global crops, and of a local and a global one; as fractions of the image's area.
    """
    strength = (0.4, 0.4, 0.2, 0.1)
    globals_, locals_ = settings.global_crops, settings.local_crops
    first, later = crop_colours(strength, blur_p=1.0), crop_colours(strength, blur_p=0.1, solarize_p=0.2)
    views = [
        ViewSpec(
            "global",
            globals_.size,
            globals_.count,
            globals_.scale,
            flip_p=settings.flip,
            photometric=(first,) + (later,) * (globals_.count - 1),
            min_overlap=min_overlap[0],
            overlap_with="global" if min_overlap[0] else None,
        )
    ]
    if locals_.count:
        views.append(
            ViewSpec(
                "local",
                locals_.size,
                locals_.count,
                locals_.scale,
                flip_p=settings.flip,
                photometric=crop_colours(strength, blur_p=0.5),
                min_overlap=min_overlap[1],
                overlap_with="global" if min_overlap[1] else None,
            )
        )
    return ViewPlan(tuple(views))
