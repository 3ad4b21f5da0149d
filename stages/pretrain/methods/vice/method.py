"""ViCE: a superpixel is assigned to prototypes in one view, and the other views predict this assignment.

Source: docs/methods.md#vice. The equation numbers are the paper's.

Terms: swapped (L_cl, Eq. 3), and coherence if `region` is "representative" (released COCO configs).

The exported encoder is the backbone, and evaluations read the backbone's own map. The decoder is used in training only.

Shape legend: V views, B images of this rank, N = V * B, h w sides of a map, S side of a view, D width of an embedding,
P = N * S * S pixels, R mutual regions of all images of this rank, K prototypes, Q rows of the queue.
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
from stages.pretrain.views.sheet import Panel
from stages.training.collectives import all_reduce_max, all_reduce_sum, gather, rank, world_size


class DenseNetwork(nn.Module):
    """f of Eq. 1: a backbone with a decoder, which gives an embedding for each pixel of a view.

    Source: docs/methods.md#vice-network.
    """

    def __init__(self, encoder: Encoder, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, view_N3SS: Tensor) -> Tensor:
        """Embeddings (N, D, S, S), in float32 or wider even under autocast, in the memory format `channels_last`."""
        map_NDhw = at_least_float32(self.decoder(self.encoder.levels(view_N3SS)))
        map_NDhw = map_NDhw.contiguous(memory_format=torch.channels_last)  # so that pooling reads whole pixels
        return functional.interpolate(map_NDhw, size=view_N3SS.shape[2:], mode="bilinear", align_corners=True)


class ViCE(Method):
    """One network and its prototypes. There is no teacher: the first view gives the targets, without gradient."""

    queue: Tensor  # (Q, D) embeddings of regions in earlier first views of all ranks, newest first
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
        self._fresh: list[Tensor] = []  # first-view embeddings for the queue, of each forward pass of this step
        self._watched: dict[str, Tensor] = {}

    def view_plan(self) -> ViewPlan:
        """A view around a point with much content, others around it, and the regions that all of them show."""
        return view_plan(self.settings)

    def start_step(self, step: Step) -> None:
        """Switches the queue on from step `queue.start`."""
        self.queue_in_use = step.index >= self.settings.queue.start
        self._fresh = []

    def compute_terms(self, batch: Batch) -> dict[str, Tensor]:
        """All views through the network, pooled to regions; the other views predict the first one's assignments."""
        regions_VBSS, count_B = batch.extras["regions"].transpose(0, 1).long(), batch.extras["count"]
        total = int(count_B.sum())
        # All views, the first too, in one forward pass: batch norms see them together, as in the official code.
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

    def preview_panels(self, batch: Batch) -> list[Panel]:
        """Each view as the network sees it: noise on masked regions, lines around mutual ones, the rest dark."""
        regions_VBSS = batch.extras["regions"].transpose(0, 1).long()
        seen_VB3SS = self._filled(batch, regions_VBSS)
        shown_VBSS = torch.where(regions_VBSS == MASKED, batch.extras["count"][:, None, None], regions_VBSS)
        return [
            Panel(f"view {v}: mutual regions" + (", noise" if self.settings.mask.ratio else ""), seen, regions=shown)
            for v, (seen, shown) in enumerate(zip(seen_VB3SS, shown_VBSS, strict=True))
        ]

    def _filled(self, batch: Batch, regions_VBSS: Tensor) -> Tensor:
        """The views with masked regions filled with U(-1, 1) noise, which depends on the step only, not on the rank."""
        views = batch.views["view"]
        shape = (len(views), 1, *views.shape[2:])
        noise = torch.rand(shape, generator=batch.generator()).mul_(2).sub_(1).to(views)
        return torch.where((regions_VBSS == MASKED)[:, :, None], noise, views)

    def _pooled(
        self, map_NDSS: Tensor, index_VBSS: Tensor, count_B: Tensor, total: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """z* of every region in every view, (V, R, D), and the term coherence if regions are representatives."""
        settings, views = self.settings, len(index_VBSS)
        if settings.region == "mean":
            z = pool_regions(map_NDSS, index_VBSS.flatten(0, 1), views * total, order=settings.pool_order)
            return z.view(views, total, -1), {}
        unit_PD, index_P = functional.normalize(pixel_rows(map_NDSS), dim=1), index_VBSS.flatten()
        z = representatives(unit_PD, index_P, views * total, self.prototypes)
        # The mean over the regions of an image, then over images and views. The first view is trained by it too.
        spread_R = coherence(unit_PD, index_P, z).view(views, total).mean(dim=0)
        term = (spread_R / _of_each_region(count_B, total)).sum() / len(count_B)
        return z.view(views, total, -1), {"coherence": term}

    def _targets(self, scores_RK: Tensor) -> Tensor:
        """q: the first view's assignments, from Sinkhorn over the regions of all ranks and the queue."""
        settings, balanced = self.settings, scores_RK
        if self.queue_in_use:
            # Each rank scores its share of the rows, with the present prototypes.
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
        """(R,), the weight of each region's loss. With it, the average over ranks is the mean over the global batch."""
        if self.settings.loss_mean == "per_image":
            return 1 / (_of_each_region(count_B, total) * len(count_B))
        everywhere = all_reduce_sum(count_B.sum())
        return (world_size() / everywhere.double()).expand(total)

    def before_update(self, step: Step) -> None:
        """Drops the gradients of the prototypes in the first steps (`frozen_steps`)."""
        if step.index < self.settings.frozen_steps:
            self.prototypes.grad = None

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """Brings the prototypes back to length 1 and pushes this step's first-view embeddings into the queue."""
        self.prototypes.copy_(functional.normalize(self.prototypes, dim=1))
        for fresh in self._fresh:  # only now: the queue must hold earlier batches when assignments are balanced
            newest = gather(fresh).to(self.queue.dtype)
            self.queue.copy_(pushed(self.queue, newest))
            self.queue_filled.copy_((self.queue_filled + len(newest)).clamp(max=len(self.queue)))
        self._fresh = []

    def encoder(self) -> Encoder:
        """The backbone, without the decoder."""
        return self.network.encoder

    def diagnostics(self) -> dict[str, float]:
        """Entropy of the assignments, shares of prototypes and queue in use, and mutual regions of an image."""
        filled = self.queue_filled / max(1, len(self.queue))
        return {name: float(value) for name, value in (self._watched | {"queue_filled": filled}).items()}


def region_index(regions_VBSS: Tensor, count_B: Tensor, total: int) -> Tensor:
    """Numbers the regions of all views of all images, so that each has its own.

    Args:
        regions_VBSS: for each pixel, the number of its region within the image; below 0 if it has none.
        count_B: regions of each image.
        total: their sum, R.

    Returns:
        (V, B, S, S) int64: view times R, plus the regions of earlier images, plus the number within the image; -1 for
        pixels without a region.
    """
    first_B = count_B.cumsum(0) - count_B
    first_VB = first_B + total * torch.arange(len(regions_VBSS), device=count_B.device)[:, None]
    return torch.where(regions_VBSS < 0, -1, regions_VBSS + first_VB[:, :, None, None])


def _of_each_region(count_B: Tensor, total: int) -> Tensor:
    """For each region, how many regions its image has: (R,)."""
    return count_B.repeat_interleave(count_B, output_size=total)
