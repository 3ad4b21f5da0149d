"""Image vectors of the splits that `classify_knn` compares, by several encoders at once, and what the vote says.

Shape legend: N images, D width, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stages.data.ahead import in_batches
from stages.data.images import decode
from stages.data.prepared import prepared
from stages.evaluate.classify_knn_settings import ClassifyKnnConfig
from stages.evaluate.weighted_knn import accuracy, nearest, ranks, votes
from stages.models.encoder import Encoder
from stages.models.inference import RGB, Inference, centre_square

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact


@dataclass(frozen=True)
class SplitVectors:
    """The usable images of one split."""

    ids: list[int]
    keys: list[str]
    labels: Tensor  # (N,) int64
    by_encoder: dict[str, Tensor]  # the suffix of the encoder's metrics -> (N, D) float32, L2-normalised


@dataclass(frozen=True)
class Votes:
    """The vote on every test image."""

    neighbors: Tensor  # (N, K) rows of the train split, nearest first
    predictions: Tensor  # (N,) label ids
    ranks: Tensor  # (N,) place of the true class, 0 = first

    def metrics(self) -> dict[str, float]:
        """Accuracies in per cent."""
        return {"top1": accuracy(self.ranks, 1), "top5": accuracy(self.ranks, 5)}


def encode_split(
    images: Artifact,
    labels: Mapping[int, int],
    encoders: Mapping[str, Encoder],
    config: ClassifyKnnConfig,
    *,
    batch_size: int,
    problems: list[dict[str, str]],
    report: Callable[[int], None],
) -> SplitVectors:
    """The vectors of one split; every image is decoded once and given to all encoders.

    Args:
        images: an artifact of kind `images`.
        labels: image_id -> label_id; the images of the split.
        encoders: by the suffix of their metrics.
        config: says the crop, the pooling and the precision.
        batch_size: images of one forward pass.
        problems: grows by an entry for each image that cannot be decoded; that image is left out.
        report: called with the number of images encoded so far.
    """

    def prepare(row: Mapping[str, Any]) -> tuple[int, str, RGB]:
        return row["image_id"], str(row["key"]), centre_square(decode(row["image"]), config.resize, config.crop)

    inferences = {name: Inference(encoder, precision=config.precision) for name, encoder in encoders.items()}
    ids: list[int] = []
    keys: list[str] = []
    found: dict[str, list[Tensor]] = {name: [] for name in encoders}
    for batch in in_batches(prepared(images, ["key", "image"], prepare, set(labels), problems=problems), batch_size):
        ids += [image_id for image_id, _, _ in batch]
        keys += [key for _, key, _ in batch]
        for name, inference in inferences.items():
            found[name].append(inference.pooled([pixels for _, _, pixels in batch], config.pooling))
        report(len(ids))
    empty = torch.empty(0, 0)
    vectors = {name: torch.cat(batches) if batches else empty for name, batches in found.items()}
    return SplitVectors(ids, keys, torch.tensor([labels[image_id] for image_id in ids], dtype=torch.int64), vectors)


def judge(train: SplitVectors, test: SplitVectors, encoder: str, classes: int, *, k: int, temperature: float) -> Votes:
    """What the k nearest train images say about every test image.

    Args:
        train: the images that vote.
        test: the images that are classified.
        encoder: whose vectors are compared, a key of `by_encoder`.
        classes: number of classes.
        k: neighbours that vote.
        temperature: a neighbour's vote weighs exp(cosine / temperature).

    Raises: ValueError if there are fewer than k train images.
    """
    similarity, rows = nearest(train.by_encoder[encoder], test.by_encoder[encoder], k)
    given = votes(similarity, train.labels.to(rows.device)[rows], classes, temperature).cpu()
    # The same order as in `ranks`: where classes tie, the predicted one is the one of rank 0.
    predictions = given.argsort(dim=1, descending=True, stable=True)[:, 0]
    return Votes(rows.cpu(), predictions, ranks(given, test.labels))
