"""ViCE: what a superpixel is assigned to in one view is predicted from the others
(docs/methods.md#vice; its equations).

Terms: swapped (L_cl, Eq. 3), and with `region: representative` coherence (released COCO configs).

The encoder that is exported is the backbone: the decoder serves training and is dropped, and evaluations read the
backbone's own map.

Shape legend: V views, B images of this rank, S side of a view, D width, R mutual regions of all images of this rank,
K prototypes, Q rows of the queue.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from pipeline.errors import UsageError
from stages.models.decoders import build_decoder
from stages.models.encoder import Encoder
from stages.models.heads import at_least_float32
from stages.pretrain.data.batch import Batch
from stages.pretrain.losses.sinkhorn import sinkhorn
from stages.pretrain.methods.method import Method, Step
from stages.pretrain.methods.shared.assignments import entropy, usage
from stages.pretrain.methods.vice.losses.region_pool import coherence, pixel_rows, pool_regions, representatives
from stages.pretrain.methods.vice.losses.swapped_prediction import pushed, swapped_prediction
from stages.pretrain.methods.vice.regions import MASKED
from stages.pretrain.methods.vice.settings import ViCESettings
from stages.pretrain.methods.vice.views import view_plan
from stages.pretrain.views.plan import ViewPlan
from stages.training.collectives import all_reduce_max, all_reduce_sum, gather, rank, world_size


class DenseNetwork(nn.Module):
    """f: a backbone with a decoder, one embedding for each pixel of a view (Eq. 1)."""

    def __init__(self, encoder: Encoder, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, view_N3SS: Tensor) -> Tensor:
        """(N, D, S, S), in float32 or wider also under autocast, and in memory one pixel after the other."""
        map_NDhw = at_least_float32(self.decoder(self.encoder.levels(view_N3SS)))
        map_NDhw = map_NDhw.contiguous(memory_format=torch.channels_last)  # so that pooling reads whole pixels
        return functional.interpolate(map_NDhw, size=view_N3SS.shape[2:], mode="bilinear", align_corners=True)


class ViCE(Method):
    """One network and its prototypes; no teacher: the first view, without gradient, is the target."""

    queue: Tensor  # (Q, D) embeddings of past first views of all ranks, newest first
    queue_filled: Tensor  # () rows in use

    def __init__(self, settings: ViCESettings, encoder: Encoder) -> None:
        super().__init__()
        if encoder.filter is not None:
            raise UsageError(
                "method vice trains a backbone's levels, which no object-aware filter sees: give an init without one"
            )
        self.settings = settings
        width = settings.decoder.width
        self.network = DenseNetwork(encoder, build_decoder(settings.decoder.name, encoder, width))
        self.prototypes = nn.Parameter(functional.normalize(torch.randn(settings.prototypes, width), dim=1))
        self.register_buffer("queue", torch.zeros(settings.queue.size, width))
        self.register_buffer("queue_filled", torch.zeros((), dtype=torch.int64))
        self.queue_in_use = False
        self._fresh: list[Tensor] = []  # of this step's forward passes: first-view embeddings for the queue
        self._watched: dict[str, Tensor] = {}

    def view_plan(self) -> ViewPlan:
        return view_plan(self.settings)

    def start_step(self, step: Step) -> None:
        self.queue_in_use = step.index >= self.settings.queue.start
        self._fresh = []

    def compute_terms(self, batch: Batch) -> dict[str, Tensor]:
        regions_VBSS, count_B = batch.extras["regions"].transpose(0, 1).long(), batch.extras["count"]
        total = int(count_B.sum())
        # All views in one pass, the first too: batch norms see them together, as in the official code.
        map_NDSS = self.network(self._filled(batch, regions_VBSS).flatten(0, 1))
        with torch.autocast(map_NDSS.device.type, enabled=False):
            index_VBSS = region_index(regions_VBSS, count_B, total)
            z_VRD, terms = self._pooled(map_NDSS, index_VBSS, count_B, total)
            scores_VRK = z_VRD @ self.prototypes.T  # Eq. 2
            targets_RK = self._targets(scores_VRK[0].detach())
            swapped = swapped_prediction(
                scores_VRK[1:],
                targets_RK,
                temperature=self.settings.temperature,
                weight_R=self._weights(count_B, total).to(scores_VRK.dtype),
            )
        self._fresh.append(z_VRD[0].detach())
        self._watched = {
            "assignment_entropy": entropy(targets_RK),
            "prototype_usage": usage(targets_RK),
            "regions_per_image": count_B.double().mean(),
        }
        return {"swapped": swapped, **terms}

    def _filled(self, batch: Batch, regions_VBSS: Tensor) -> Tensor:
        """The views with masked regions filled with U(-1, 1) noise: that of the step, so that ranks agree."""
        views = batch.views["view"]
        shape = (len(views), 1, *views.shape[2:])
        noise = torch.rand(shape, generator=batch.generator()).mul_(2).sub_(1).to(views)
        return torch.where((regions_VBSS == MASKED)[:, :, None], noise, views)

    def _pooled(
        self, map_NDSS: Tensor, index_VBSS: Tensor, count_B: Tensor, total: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """z* of every region in every view, (V, R, D), and the coherence term where regions are representatives."""
        settings, views = self.settings, len(index_VBSS)
        if settings.region == "mean":
            z = pool_regions(map_NDSS, index_VBSS.flatten(0, 1), views * total, order=settings.pool_order)
            return z.view(views, total, -1), {}
        unit_PD, index_P = functional.normalize(pixel_rows(map_NDSS), dim=1), index_VBSS.flatten()
        z = representatives(unit_PD, index_P, views * total, self.prototypes)
        # Averaged over the regions of an image, then over images and views; the first view learns from it too.
        spread_R = coherence(unit_PD, index_P, z).view(views, total).mean(dim=0)
        term = (spread_R / _of_each_region(count_B, total)).sum() / len(count_B)
        return z.view(views, total, -1), {"coherence": term}

    def _targets(self, scores_RK: Tensor) -> Tensor:
        """q: the first view's assignments, balanced over the regions of all ranks and the queue."""
        settings, balanced = self.settings, scores_RK
        if self.queue_in_use:
            # Each rank scores its share of the rows, with the prototypes of today.
            mine = self.queue[: int(self.queue_filled)][rank() :: world_size()]
            balanced = torch.cat([balanced, mine.to(scores_RK.dtype) @ self.prototypes.detach().T])
        q = sinkhorn(
            balanced,
            epsilon=settings.epsilon,
            iterations=settings.iterations,
            all_reduce=all_reduce_sum,
            all_reduce_max=all_reduce_max,
        )
        return q[: len(scores_RK)]

    def _weights(self, count_B: Tensor, total: int) -> Tensor:
        """(R,) what each region's loss counts, so that the average over ranks is the mean of the global batch."""
        if self.settings.loss_mean == "per_image":
            return 1 / (_of_each_region(count_B, total) * len(count_B))
        everywhere = all_reduce_sum(count_B.sum())
        return (world_size() / everywhere.double()).expand(total)

    def before_update(self, step: Step) -> None:
        if step.index < self.settings.frozen_steps:
            self.prototypes.grad = None

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        self.prototypes.copy_(functional.normalize(self.prototypes, dim=1))
        for fresh in self._fresh:  # after the loss: a batch is balanced against past ones
            newest = gather(fresh).to(self.queue.dtype)
            self.queue.copy_(pushed(self.queue, newest))
            self.queue_filled.copy_((self.queue_filled + len(newest)).clamp(max=len(self.queue)))
        self._fresh = []

    def encoder(self) -> Encoder:
        return self.network.encoder

    def diagnostics(self) -> dict[str, float]:
        filled = self.queue_filled / max(1, len(self.queue))
        return {name: float(value) for name, value in (self._watched | {"queue_filled": filled}).items()}


def region_index(regions_VBSS: Tensor, count_B: Tensor, total: int) -> Tensor:
    """Numbers that no two regions of a batch share: views first, then images, then the image's own number; else -1."""
    first_B = count_B.cumsum(0) - count_B
    first_VB = first_B + total * torch.arange(len(regions_VBSS), device=count_B.device)[:, None]
    return torch.where(regions_VBSS < 0, -1, regions_VBSS + first_VB[:, :, None, None])


def _of_each_region(count_B: Tensor, total: int) -> Tensor:
    """(R,) how many regions a region's image has."""
    return count_B.repeat_interleave(count_B, output_size=total)
