"""Image vectors of the splits that `classify_knn` compares, by several encoders at once, and what the vote says.

Shape legend: N images, D width, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.data.images import decode
from stages.evaluate.features import Row, in_batches, prepared
from stages.evaluate.weighted_knn import accuracy, nearest, ranks, votes
from stages.models.encoder import Encoder
from stages.models.inference import RGB, Inference, centre_square

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact
    from stages.evaluate.classify_knn import ClassifyKnnConfig


@dataclass(frozen=True)
class Vectors:
    """One split: L2-normalised vectors by encoder (its metrics' suffix)."""

    ids: list[int]
    labels: Tensor  # (N,) int64
    by_encoder: dict[str, Tensor]  # (N, D) float32


@dataclass(frozen=True)
class Judged:
    """The vote on every test image."""

    neighbors: Tensor  # (N, K) rows of the train split, nearest first
    predictions: Tensor  # (N,) label ids
    ranks: Tensor  # (N,) place of the true class

    def metrics(self) -> dict[str, float]:
        return {"top1": accuracy(self.ranks, 1), "top5": accuracy(self.ranks, 5)}


def encode_split(
    images: Artifact,
    labels: Mapping[int, int],
    encoders: Mapping[str, Encoder],
    config: ClassifyKnnConfig,
    *,
    batch_size: int,
    problems: list[dict[str, str]],
    progress: Callable[[int], None],
) -> Vectors:
    """Decodes every image once and gives it to all encoders."""

    def prepare(row: Row) -> tuple[int, RGB]:
        return row["image_id"], centre_square(decode(row["image"]), config.resize, config.crop)

    inferences = {name: Inference(encoder, precision=config.precision) for name, encoder in encoders.items()}
    ids: list[int] = []
    found: dict[str, list[Tensor]] = {name: [] for name in encoders}
    for batch in in_batches(prepared(images, ["key", "image"], prepare, set(labels), problems=problems), batch_size):
        ids += [image_id for image_id, _ in batch]
        for name, inference in inferences.items():
            found[name].append(inference.pooled([pixels for _, pixels in batch], config.pooling))
        progress(len(ids))
    empty = torch.empty(0, 0)
    vectors = {name: torch.cat(parts) if parts else empty for name, parts in found.items()}
    return Vectors(ids, torch.tensor([labels[image_id] for image_id in ids], dtype=torch.int64), vectors)


def judge(train: Vectors, test: Vectors, encoder: str, classes: int, *, k: int, temperature: float) -> Judged:
    similarity, rows = nearest(train.by_encoder[encoder], test.by_encoder[encoder], k)
    given = votes(similarity, train.labels.to(rows.device)[rows], classes, temperature).cpu()
    # The same order as `ranks`, so that a tie is decided once.
    predictions = given.argsort(dim=1, descending=True, stable=True)[:, 0]
    return Judged(rows.cpu(), predictions, ranks(given, test.labels))
