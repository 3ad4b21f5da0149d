"""Base of the methods that compare two views of an image: SimCLR, MoCo, BYOL, SimSiam, Barlow Twins, VICReg, ReSSL.

Source: docs/methods.md#views-of-two-view-methods.

It encodes and projects the views. Each method's own file says what is compared with what.

Shape legend: B images of this rank, S side of a view, D width of a projection.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from stages.models.encoder import Encoder
from stages.models.heads import at_least_float32
from stages.pretrain.config.parts import Export, TeacherSettings
from stages.pretrain.data.batch import Batch
from stages.pretrain.methods.hosts.settings.two_view import TwoViewSettings
from stages.pretrain.methods.method import Method, Step
from stages.pretrain.methods.shared.colours import crop_colours
from stages.pretrain.methods.shared.teacher import move_teacher
from stages.pretrain.views.plan import Photometric, ViewPlan, ViewSpec
from stages.training.schedules import cosine


class TwoView(Method):
    """Two views of an image and a network; in some methods also a predictor and a moving average of the network."""

    def __init__(
        self,
        settings: TwoViewSettings,
        encoder: Encoder,
        projector: nn.Module,
        *,
        predictor: nn.Module | None = None,
        teacher: TeacherSettings | None = None,
        export: Export = "student",
    ) -> None:
        super().__init__()
        self.settings = settings
        self.network = Network(encoder, projector)
        self.predictor = predictor
        self.teacher = self.network.frozen_copy() if teacher else None
        self.teacher_settings = teacher
        self.export = export

    def colours(self) -> tuple[Photometric, Photometric]:
        """BYOL's colour operations, which most methods share: view 1 always blurred, view 2 sometimes solarised."""
        strength = (0.4, 0.4, 0.2, 0.1)
        return crop_colours(strength, blur_p=1.0), crop_colours(strength, blur_p=0.1, solarize_p=0.2)

    def view_plan(self) -> ViewPlan:
        """Two random resized crops of the image."""
        crops = self.settings
        view = ViewSpec("global", crops.size, 2, crops.scale, flip_p=crops.flip, photometric=self.colours())
        return ViewPlan((view,))

    def project(self, batch: Batch) -> list[Tensor]:
        """The projections (B, D) of each view. Each has its own forward pass, so that batch norms see one view."""
        return [self.network(view_B3SS) for view_B3SS in batch.views["global"]]

    def predict(self, batch: Batch) -> list[Tensor]:
        """The predictor's output (B, D) for each view's projection."""
        assert self.predictor is not None
        return [self.predictor(projected_BD) for projected_BD in self.project(batch)]

    @torch.no_grad()
    def targets(self, batch: Batch) -> list[Tensor]:
        """The moving average's projections (B, D) of each view, without gradient."""
        assert self.teacher is not None
        return [self.teacher(view_B3SS) for view_B3SS in batch.views["global"]]

    def projection(self) -> tuple[nn.Module, int]:
        """The network, and D."""
        layers = [layer for layer in self.network.projector.modules() if isinstance(layer, nn.Linear)]
        return self.network, layers[-1].out_features

    def after_step(self, step: Step) -> None:
        """Moves the moving average, if the method has one."""
        if self.teacher is not None and self.teacher_settings is not None:
            settings = self.teacher_settings
            momentum = cosine(step.index, step.total, settings.momentum, settings.momentum_end)
            move_teacher(self.teacher, self.network, momentum)

    def encoder(self) -> Encoder:
        """The encoder that gets gradients, unless `export` names the moving average."""
        if self.export == "teacher":
            assert self.teacher is not None
            return self.teacher.encoder
        return self.network.encoder


class Network(nn.Module):
    """An encoder and the projector on its global vector."""

    def __init__(self, encoder: Encoder, projector: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector

    def forward(self, image_B3SS: Tensor) -> Tensor:
        """The projection of each image, (B, D)."""
        projected_BD: Tensor = self.projector(self.encoder(image_B3SS).vector)
        return projected_BD

    def frozen_copy(self) -> Network:
        """A copy without gradients and without stochastic depth, to be moved as an average."""
        return Network(self.encoder.teacher(), copy.deepcopy(self.projector)).requires_grad_(False)


def exactly(loss: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """The value of a loss in float32 or wider, even under autocast: a scalar."""
    with torch.autocast(rows[0].device.type, enabled=False):
        return loss(*(at_least_float32(row) for row in rows)).squeeze()
