"""Base of the methods that compare two views of an image: SimCLR, MoCo, BYOL, SimSiam, Barlow Twins, VICReg, ReSSL.

It encodes and projects; what is compared with what is in each method's own file.

Shape legend: V views (2), B images of this rank, D width of a projection.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from stages.models.encoder import Encoder
from stages.models.heads import at_least_float32
from stages.pretrain.config.parts import TeacherSettings
from stages.pretrain.data.batch import Batch
from stages.pretrain.methods.hosts.settings.two_view import TwoViewSettings
from stages.pretrain.methods.method import Method, Step
from stages.pretrain.methods.shared.colours import crop_colours
from stages.pretrain.methods.shared.teacher import move_teacher
from stages.pretrain.views.plan import Photometric, ViewPlan, ViewSpec
from stages.training.schedules import cosine


class Network(nn.Module):
    """An encoder and the projector on its global vector."""

    def __init__(self, encoder: Encoder, projector: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector

    def forward(self, image_B3SS: Tensor) -> Tensor:
        projected_BD: Tensor = self.projector(self.encoder(image_B3SS).vector)
        return projected_BD

    def frozen_copy(self) -> Network:
        return Network(self.encoder.teacher(), copy.deepcopy(self.projector)).requires_grad_(False)


class TwoView(Method):
    """A network, where the method has them a predictor and a moving average of the network, and two views.

    `encoder()` is the network that gets gradients: what these papers evaluate, also where there is an average.
    """

    def __init__(
        self,
        settings: TwoViewSettings,
        encoder: Encoder,
        projector: nn.Module,
        *,
        predictor: nn.Module | None = None,
        teacher: TeacherSettings | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.network = Network(encoder, projector)
        self.predictor = predictor
        self.teacher = self.network.frozen_copy() if teacher else None
        self.teacher_settings = teacher

    def colours(self) -> tuple[Photometric, Photometric]:
        """Of the first and the second view; BYOL's, which most share: one always blurred, one at times solarised."""
        strength = (0.4, 0.4, 0.2, 0.1)
        return crop_colours(strength, blur_p=1.0), crop_colours(strength, blur_p=0.1, solarize_p=0.2)

    def view_plan(self) -> ViewPlan:
        crops = self.settings
        view = ViewSpec("global", crops.size, 2, crops.scale, flip_p=crops.flip, photometric=self.colours())
        return ViewPlan((view,))

    def project(self, batch: Batch) -> list[Tensor]:
        """(B, D) of each view; one forward pass a view, so that batch norms see views apart."""
        return [self.network(view_B3SS) for view_B3SS in batch.views["global"]]

    def predict(self, batch: Batch) -> list[Tensor]:
        """`project`, through the predictor."""
        assert self.predictor is not None
        return [self.predictor(projected_BD) for projected_BD in self.project(batch)]

    @torch.no_grad()
    def targets(self, batch: Batch) -> list[Tensor]:
        """The moving average's projections (B, D) of each view."""
        assert self.teacher is not None
        return [self.teacher(view_B3SS) for view_B3SS in batch.views["global"]]

    def after_step(self, step: Step) -> None:
        if self.teacher is not None and self.teacher_settings is not None:
            settings = self.teacher_settings
            momentum = cosine(step.index, step.total, settings.momentum, settings.momentum_end)
            move_teacher(self.teacher, self.network, momentum)

    def encoder(self) -> Encoder:
        return self.network.encoder


def exactly(loss: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """A loss in float32 at least, whatever autocast would do: a scalar."""
    with torch.autocast(rows[0].device.type, enabled=False):
        return loss(*(at_least_float32(row) for row in rows)).squeeze()
