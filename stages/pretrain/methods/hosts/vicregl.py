"""VICRegL: VICReg of the views' vectors, and of their cells, matched by similarity and by place.

Source: docs/methods.md#vicregl.

Shape legend: B images of this rank, S side of a view, D width of a projection, h w sides of a map, N = h w cells.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stages.models.encoder import Encoder
from stages.models.heads import at_least_float32
from stages.models.mlp import mlp
from stages.pretrain.data.batch import Batch
from stages.pretrain.methods.hosts.losses.vicregl import ProjectedView, global_parts, local_parts
from stages.pretrain.methods.hosts.settings.vicregl import VICRegLSettings
from stages.pretrain.methods.method import Method, Step
from stages.pretrain.methods.shared.colours import crop_colours
from stages.pretrain.views.plan import ViewPlan, ViewSpec
from stages.training.collectives import gather_with_gradient


class VICRegL(Method):
    """Large and small crops, a projector for vectors and one for cells. Terms: global, local."""

    def __init__(self, settings: VICRegLSettings, encoder: Encoder) -> None:
        super().__init__()
        self.settings = settings
        self.student = encoder
        self.projector = mlp(settings.projector.widths(encoder.vector_width))
        self.local_projector = mlp(settings.local_projector.widths(encoder.width))

    def view_plan(self) -> ViewPlan:
        """Large crops with BYOL's colours, and small ones if the settings ask for them."""
        settings, strength = self.settings, (0.4, 0.4, 0.2, 0.1)
        globals_, locals_ = settings.global_crops, settings.local_crops
        first, later = crop_colours(strength, blur_p=1.0), crop_colours(strength, blur_p=0.1, solarize_p=0.2)
        colours = (first,) + (later,) * (globals_.count - 1)
        views = [
            ViewSpec("global", globals_.size, globals_.count, globals_.scale, flip_p=settings.flip, photometric=colours)
        ]
        if locals_.count:
            colour = crop_colours(strength, blur_p=0.5)
            views.append(
                ViewSpec("local", locals_.size, locals_.count, locals_.scale, flip_p=settings.flip, photometric=colour)
            )
        return ViewPlan(tuple(views))

    def compute_terms(self, batch: Batch) -> dict[str, Tensor]:
        """VICReg of the projected vectors, and of the matched cells."""
        settings = self.settings
        views, others = self._project(batch, "global"), self._project(batch, "local")
        weights = settings.invariance, settings.variance, settings.covariance
        with torch.autocast(batch.views["global"].device.type, enabled=False):
            whole = global_parts(views, others, gather=gather_with_gradient)
            local = local_parts(
                views,
                others,
                num_matches=settings.num_matches,
                order=settings.match_order,
                gather=gather_with_gradient,
            )
        return {"global": whole.weighted(*weights), "local": local.weighted(*weights)}

    def _project(self, batch: Batch, name: str) -> list[ProjectedView]:
        """The projected views of one size. One forward pass for each, so that batch norms see the views separately."""
        views = []
        for image_B3SS, affine_B23 in zip(batch.views.get(name, ()), batch.affines.get(name, ()), strict=True):
            vector_BD, map_BDhw = self.student(image_B3SS)
            cells = _by_row(self.local_projector, map_BDhw.flatten(2).transpose(1, 2))
            places = cell_centres(affine_B23, image_B3SS.shape[-1], map_BDhw.shape[-2], map_BDhw.shape[-1])
            views.append(ProjectedView(at_least_float32(self.projector(vector_BD)), at_least_float32(cells), places))
        return views

    def after_step(self, step: Step) -> None:
        """Nothing: VICRegL has no teacher and no queue."""
        return

    def encoder(self) -> Encoder:
        """The student, the only network."""
        return self.student


def cell_centres(affine_B23: Tensor, size: int, height: int, width: int) -> Tensor:
    """The centres of a map's cells in pixels of the stored image; mirrored views need no special case.

    Args:
        affine_B23: from the view's pixels to the stored image's.
        size: side of the view in pixels.
        height: rows of the map.
        width: columns of the map.

    Returns:
        (B, N, 2), x and y, cells row by row.
    """
    y = (torch.arange(height, device=affine_B23.device, dtype=affine_B23.dtype) + 0.5) * size / height
    x = (torch.arange(width, device=affine_B23.device, dtype=affine_B23.dtype) + 0.5) * size / width
    points_N3 = torch.stack([x.repeat(height), y.repeat_interleave(width), torch.ones_like(x).repeat(height)], dim=1)
    return points_N3 @ affine_B23.transpose(1, 2)


def _by_row(module: nn.Module, rows_BND: Tensor) -> Tensor:
    projected: Tensor = module(rows_BND.flatten(0, 1))
    return projected.reshape(*rows_BND.shape[:2], -1)
