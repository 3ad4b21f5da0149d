"""D3SSL: contrasts proposals so that their features depend little on neighbouring objects and on their place.

Source: docs/methods.md#d3ssl. The equation numbers are the paper's.

Terms: decouple (L_dc, Eq. 4), deposition (L_dp, Eq. 9). A term of weight 0 is not computed.

Views: 1 the whole image, 2 a crop, 2s the crop at a smaller size, 3 the crop's regions pasted at another place of
another image.

Shape legend: B images of this rank, K proposals of each, R = B * K regions in that order, C channels of a map, D width
of a region's vector, S side of a view, s side of a pooled region, M rows of the bank.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from pipeline.errors import UsageError
from stages.models.encoder import Encoder
from stages.models.heads import at_least_float32
from stages.pretrain.data.batch import Batch
from stages.pretrain.losses.roi_align import roi_align_regions
from stages.pretrain.methods.d3ssl.losses.d3ssl_loss import decoupling_loss, depositioning_loss
from stages.pretrain.methods.d3ssl.region_masks import compose, kept, union
from stages.pretrain.methods.d3ssl.settings import D3SSLSettings
from stages.pretrain.methods.d3ssl.views import view_plan
from stages.pretrain.methods.method import Method, Step
from stages.pretrain.methods.shared.pairing import next_in_batch
from stages.pretrain.methods.shared.teacher import move_teacher
from stages.pretrain.views.plan import ViewPlan
from stages.pretrain.views.sheet import Panel
from stages.training.collectives import all_reduce_sum, gather
from stages.training.schedules import cosine


class RegionEncoder(nn.Module):
    """f(x, b) of Eq. 1: from a view and boxes to one unit vector for each box.

    On a ResNet: RoIAlign on C4 (the output of the last stage but one), the last stage, average pooling, projector. On
    any other backbone: RoIAlign on its feature map, average pooling, projector.

    Source: docs/methods.md#d3ssl-region-encoder.
    """

    def __init__(self, encoder: Encoder, head: nn.Module, roi_size: int) -> None:
        super().__init__()
        self.encoder, self.head, self.roi_size = encoder, head, roi_size

    def forward(self, view_B3SS: Tensor, boxes_BK4: Tensor) -> Tensor:
        """Unit vectors (R, D) of boxes in the view's pixels, in float32 or wider even under autocast."""
        is_resnet = self.encoder.is_resnet
        map_BChw = self.encoder.stem_to_c4(view_B3SS) if is_resnet else self.encoder(view_B3SS).map
        boxes_BK4 = boxes_BK4 * (map_BChw.shape[-1] / view_B3SS.shape[-1])
        regions_RCss = roi_align_regions(map_BChw, boxes_BK4, size=self.roi_size)
        if is_resnet:
            regions_RCss = self.encoder.c5(regions_RCss)
        return functional.normalize(at_least_float32(self.head(regions_RCss.mean(dim=(2, 3)))), dim=1)

    def teacher(self) -> RegionEncoder:
        """A copy without gradients and without stochastic depth."""
        twin = RegionEncoder(self.encoder.teacher(), copy.deepcopy(self.head), self.roi_size)
        return twin.requires_grad_(False)


class D3SSL(Method):
    """Student, teacher, and a bank of the teacher's past regions, which are the negatives."""

    bank: Tensor  # (M, D)
    bank_next: Tensor  # () row for the next region
    bank_filled: Tensor  # () rows in use
    without_boxes: Tensor  # () images so far, of all ranks, that had no box to use

    def __init__(self, settings: D3SSLSettings, encoder: Encoder) -> None:
        super().__init__()
        self.settings = settings
        self.student = RegionEncoder(encoder, _make_head(encoder, settings), settings.roi_size)
        self.teacher = self.student.teacher()
        self.register_buffer("bank", torch.zeros(settings.bank.size, settings.head.out))
        for name in ("bank_next", "bank_filled", "without_boxes"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self._fresh: list[Tensor] = []  # regions for the bank, of each forward pass of this step
        self._whole: list[Tensor] = []  # number of images without boxes, likewise
        self._watched: dict[str, Tensor] = {}

    def view_plan(self) -> ViewPlan:
        """The whole image and one crop, with the regions that both show (views.py)."""
        return view_plan(self.settings)

    def representation(self) -> None:
        """None: on a ViT the encoder runs as a whole.

        Raises:
            UsageError: on a ResNet, whose last stage sees regions only, so that there is no vector of a view.
        """
        if self.student.encoder.is_resnet:
            raise UsageError(
                "d3ssl on a ResNet runs the last stage on regions and makes no vector of a view, so dsa has nothing to "
                "compare: choose a ViT, or another host"
            )

    def start_step(self, step: Step) -> None:
        """Starts a step with no new regions for the bank."""
        self._fresh, self._whole = [], []

    def compute_terms(self, batch: Batch) -> dict[str, Tensor]:
        """The teacher's regions of views 1 and 2, then each term that has a weight."""
        settings, extras = self.settings, batch.extras
        view1, view2 = batch.views["whole"][0], batch.views["crop"][0]
        boxes1, boxes2, boxes2s, boxes3 = extras["boxes"].to(view1.dtype).unbind(1)
        hat1 = self._hat(view1, extras["cuts"][:, 0], extras["regions"][:, 0])
        with torch.no_grad():  # Eq. 3: the teacher sees the second view whole
            z_t1, z_t2 = self.teacher(hat1, boxes1), self.teacher(view2, boxes2)
        loss: dict[str, Any] = {"temperature": settings.temperature, "filled": self.bank_filled}

        terms: dict[str, Tensor] = {}
        if settings.uses("decouple"):
            view2s = functional.avg_pool2d(view2, settings.size // settings.small_size)
            hat2s = self._hat(view2s, extras["cuts"][:, 1], extras["regions"][:, 1])
            z_s1, z_s2 = self.student(hat1, boxes1), self.student(hat2s, boxes2s)
            with torch.autocast(view1.device.type, enabled=False):
                terms["decouple"] = decoupling_loss(z_s1, z_s2, z_t1, z_t2, self.bank, **loss).mean()
            self._watched["positive_cosine"] = (z_s1.detach() * z_t2).sum(dim=1).mean()
        if settings.uses("deposition"):
            z_s3 = self.student(self._pasted(batch, view2, next_in_batch(view2)), boxes3)
            with torch.autocast(view1.device.type, enabled=False):
                terms["deposition"] = depositioning_loss(z_s3, z_t1, z_t2, self.bank, **loss).mean()
            self._watched["pasted_cosine"] = (z_s3.detach() * z_t2).sum(dim=1).mean()

        both = torch.stack([z_t1, z_t2], dim=1).flatten(0, 1)
        self._fresh.append(both if settings.bank.holds == "both" else z_t1)
        self._whole.append(extras["whole"].sum())
        return terms

    def _hat(self, view_B3SS: Tensor, cuts_BR4: Tensor, regions_BR4: Tensor) -> Tensor:
        """Eq. 2: the view after the cut-outs (PRC) and the mask (PRM); what they hide gets the value `fill`."""
        size, count = view_B3SS.shape[-1], self.settings.proposals
        seen_BSS = kept(cuts_BR4, size)
        if self.settings.mask.kind == "reveal":
            seen_BSS &= union(regions_BR4, size)
        elif self.settings.mask.kind == "erase":
            seen_BSS &= union(regions_BR4[:, :count], size) | ~union(regions_BR4[:, count:], size)
        return torch.where(seen_BSS[:, None], view_B3SS, self.settings.fill)

    def _pasted(self, batch: Batch, view2_B3SS: Tensor, background_B3SS: Tensor) -> Tensor:
        """View 3 (Eq. 6 to 8): the crop's regions, moved and with cut-outs, on the crop of another image."""
        size = view2_B3SS.shape[-1]
        mask_BSS = union(batch.extras["moved"], size) & kept(batch.extras["cuts"][:, 2], size)
        return compose(view2_B3SS, background_B3SS, mask_BSS, batch.extras["shift"])

    def preview_panels(self, batch: Batch) -> list[Panel]:
        """Each view as it is compared, with its cut-outs and with the proposals whose vectors are contrasted."""
        settings, extras = self.settings, batch.extras
        view1, view2 = batch.views["whole"][0], batch.views["crop"][0]
        view2s = functional.avg_pool2d(view2, settings.size // settings.small_size)
        boxes1, boxes2, boxes2s, boxes3 = extras["boxes"].unbind(1)
        panels = [
            Panel(
                "view 1, proposals, cut-outs", self._hat(view1, extras["cuts"][:, 0], extras["regions"][:, 0]), boxes1
            ),
            Panel("view 2 of the teacher", view2, boxes2),
        ]
        if settings.uses("decouple"):
            hat2s = self._hat(view2s, extras["cuts"][:, 1], extras["regions"][:, 1])
            panels.append(Panel("view 2s, smaller", hat2s, boxes2s))
        if settings.uses("deposition"):
            panels.append(Panel("view 3, on another image", self._pasted(batch, view2, view2.roll(-1, 0)), boxes3))
        return panels

    def after_step(self, step: Step) -> None:
        """Moves the teacher, then adds this step's regions of all ranks to the bank."""
        teacher = self.settings.teacher
        move_teacher(self.teacher, self.student, cosine(step.index, step.total, teacher.momentum, teacher.momentum_end))
        for fresh in self._fresh:  # only now: the bank must not hold regions of the batch that is compared with it
            self._push(gather(fresh))
        if self._whole:
            self.without_boxes += all_reduce_sum(torch.stack(self._whole).sum())
        self._fresh, self._whole = [], []

    def _push(self, regions_ND: Tensor) -> None:
        """Replaces the oldest rows of the bank; of more regions than it has rows, the last ones are kept."""
        rows = len(self.bank)
        regions_ND = regions_ND[-rows:].to(self.bank.dtype)
        at_N = (self.bank_next + torch.arange(len(regions_ND), device=self.bank.device)) % rows
        self.bank.index_copy_(0, at_N, regions_ND)
        self.bank_next.copy_((self.bank_next + len(regions_ND)) % rows)
        self.bank_filled.copy_((self.bank_filled + len(regions_ND)).clamp(max=rows))

    def encoder(self) -> Encoder:
        """The encoder that `export` names: the student's by default."""
        return (self.student if self.settings.export == "student" else self.teacher).encoder

    def diagnostics(self) -> dict[str, float]:
        """Mean cosines of positives, the share of the bank in use, and how many images had no box to use."""
        counts = {"bank_filled": self.bank_filled / len(self.bank), "images_without_boxes": self.without_boxes}
        return {name: float(value) for name, value in (self._watched | counts).items()}


def _make_head(encoder: Encoder, settings: D3SSLSettings) -> nn.Sequential:
    width = int(encoder.model.num_features) if encoder.is_resnet else encoder.width
    hidden = settings.head.hidden
    return nn.Sequential(
        nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, settings.head.out)
    )
