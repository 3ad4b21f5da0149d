"""Watching a training: how large each term's gradient is, whether features still differ, and when to stop.

Shape legend: N feature rows, D width, B images, P forward passes of a step, T terms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from stages.models.encoder import Encoder
from stages.training.collectives import all_reduce_mean, gather_objects, world_size
from stages.training.contract import Trainable, TrainingBatch
from stages.training.settings import WatchSettings, weight_of
from stages.training.sharding import gathered

IMAGES = 64  # images of a rank's batch whose features are looked at
PATCHES = 512  # patches of those images, evenly spaced, that are looked at


class Watch:
    """Watches one rank's training. Every rank makes the same calls in the same order: some wait for all ranks."""

    def __init__(self, settings: WatchSettings, weights: Mapping[str, float]) -> None:
        self.settings, self.weights = settings, weights
        self.low: dict[str, int] = {}  # name of a number -> consecutive logged rows in which it was below its limit

    def gradients_due(self, step: int) -> bool:
        """Whether the terms' gradients are measured in this step (0-based)."""
        return self.settings.gradients_every > 0 and step % self.settings.gradients_every == 0

    def gradient_norms(self, terms: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]) -> dict[str, float]:
        """Of every term its weight and the norm of its weighted gradient, over all ranks together.

        To be called before the step's backward pass, whose graph it keeps.

        Returns:
            "weight/TERM" and "grad_norm/TERM" for each term.
        """
        trained = list(parameters)
        found: dict[str, float] = {}
        for name, term in terms.items():
            weight = weight_of(self.weights, name)
            found[f"weight/{name}"] = weight
            found[f"grad_norm/{name}"] = abs(weight) * _gradient_norm(term, trained) if weight else 0.0
        return found

    def look(self, method: Trainable, batch: TrainingBatch, *, precision: str) -> dict[str, float]:
        """Numbers of a logged step beside its terms: the method's own diagnostics and `feature_spread`."""
        with gathered(method):
            return method.diagnostics() | feature_spread(method.encoder(), batch, precision=precision)

    def wrong(
        self,
        step: int,
        names: Sequence[str],
        values_PT: Tensor,
        norm: Tensor,
        seen: Mapping[str, float],
        *,
        finite: bool,
    ) -> str | None:
        """Whether training must stop: a term or the gradient is not finite, or the features have collapsed.

        Args:
            step: 0-based.
            names: of the T terms.
            values_PT: this rank's terms in each forward pass of the step.
            norm: of the whole gradient, the same on all ranks.
            seen: what `look` returned; empty in a step that is not logged.
            finite: whether all of `values_PT` and `norm` are, on every rank (`not_finite`).

        Returns:
            Why training cannot go on, in words; None while it can.
        """
        if not finite:
            bad = _name_the_first(names, values_PT, norm)
            return f"{bad} at step {step} (lower optimizer.lr, set optimizer.clip, or precision: fp32)"
        return self._collapse(step, seen, norm.device) if seen else None

    def _collapse(self, step: int, seen: Mapping[str, float], device: torch.device) -> str | None:
        limits = {"rank_image": self.settings.min_rank, "rank_patch": self.settings.min_rank}
        limits |= dict.fromkeys(("teacher_entropy", "assignment_entropy"), self.settings.min_entropy)
        # Ranks decide together, on their mean: a rank that stopped alone would leave the others waiting.
        mine = torch.tensor([seen.get(name, math.inf) for name in limits], device=device)  # NCCL takes no CPU tensor
        means = all_reduce_mean(mine).tolist()
        for (name, limit), value in zip(limits.items(), means, strict=True):
            self.low[name] = self.low.get(name, 0) + 1 if step >= self.settings.grace and value < limit else 0
            if self.low[name] >= self.settings.patience:
                setting = "watch.min_entropy" if name.endswith("entropy") else "watch.min_rank"
                return (
                    f"the features have collapsed: {name} is {value:.4g} at step {step}, below {setting} ({limit:g}) "
                    f"for {self.low[name]} consecutive rows"
                )
        return None


@torch.no_grad()
def feature_spread(encoder: Encoder, batch: TrainingBatch, *, precision: str) -> dict[str, float]:
    """How much the encoder's features of the batch's watched images differ from each other.

    Args:
        encoder: the one that is exported.
        batch: gives the images.
        precision: "bf16" runs the forward pass under autocast.

    Returns:
        Effective rank and mean pairwise cosine, means over ranks: "rank_image" and "cosine_image" of the image
        vectors, "rank_patch" and "cosine_patch" of the patches. A cosine is left out where there is a single row.
    """
    modes = [(module, module.training) for module in encoder.modules()]
    view_B3SS = batch.watched_images()[:IMAGES]
    with torch.autocast(view_B3SS.device.type, torch.bfloat16, enabled=precision == "bf16"):
        seen = encoder.eval()(view_B3SS)
    for module, training in modes:
        module.training = training
    patches_ND = seen.tokens_BND.flatten(0, 1)
    every = max(1, len(patches_ND) // PATCHES)
    rows = {"image": seen.vector, "patch": patches_ND[::every][:PATCHES]}
    values: dict[str, Tensor] = {}
    for name, rows_ND in rows.items():
        values |= {
            f"rank_{name}": effective_rank(rows_ND.float()),
            f"cosine_{name}": mean_pairwise_cosine(rows_ND.float()),
        }
    means = all_reduce_mean(torch.stack([*values.values()])).tolist()
    return {name: mean for name, mean in zip(values, means, strict=True) if not math.isnan(mean)}


def effective_rank(rows_ND: Tensor) -> Tensor:
    """The number of directions that the rows use: from 1 (all rows alike up to a factor) to min(N, D).

    It is exp of the entropy of the singular values, each divided by their sum (Roy and Vetterli 2007; RankMe, Garrido
    et al. 2023, Eq. 1, measures collapse with it). Rows that are not finite, or all zero, have rank 0.
    """
    if not rows_ND.isfinite().all() or not rows_ND.any():
        return rows_ND.new_zeros(())
    rows = rows_ND.double()  # in float32 the many singular values that should be 0 are noise, which adds up
    gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
    singular_R = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share_R = singular_R / singular_R.sum()
    return (-torch.special.xlogy(share_R, share_R).sum()).exp().to(rows_ND.dtype)


def mean_pairwise_cosine(rows_ND: Tensor) -> Tensor:
    """Mean cosine between different rows, in [-1, 1]; 1 when all rows point the same way. NaN for a single row."""
    unit_ND = nn.functional.normalize(rows_ND, dim=1)
    count = len(unit_ND)
    return (unit_ND.sum(dim=0).square().sum() - unit_ND.square().sum()) / (count * (count - 1) or math.nan)


def not_finite(values_PT: Tensor, norm: Tensor) -> Tensor:
    """1 where a term of this rank or the gradient's norm is NaN or infinite, else 0; a scalar on their device."""
    return 1 - (values_PT.isfinite().all() & norm.isfinite()).float()


def _name_the_first(names: Sequence[str], values_PT: Tensor, norm: Tensor) -> str:
    """Which number is not finite: the first such term of any rank, or else the gradient's norm."""
    for values in itertools.chain.from_iterable(gather_objects(values_PT.tolist())):
        for name, value in zip(names, values, strict=True):
            if not math.isfinite(value):
                return f"term {name} is {value}"
    return f"the gradient's norm is {norm.item()} while every term is finite"


def _gradient_norm(term: Tensor, trained: Sequence[nn.Parameter]) -> float:
    """Norm of the gradient that all ranks together would give these parameters."""
    gradients: Sequence[Tensor | None] = [None] * len(trained)
    if term.requires_grad:  # a term that has nothing to say about this batch may be a constant
        gradients = torch.autograd.grad(term.float(), trained, retain_graph=True, allow_unused=True)
    if world_size() == 1:
        present = [gradient for gradient in gradients if gradient is not None]
        return torch.nn.utils.get_total_norm(present).item() if present else 0.0
    flat = torch.cat(
        [
            (torch.zeros_like(parameter) if gradient is None else gradient).flatten().float()
            for parameter, gradient in zip(trained, gradients, strict=True)
        ]
    )
    return all_reduce_mean(flat).norm().item()
