"""Image vectors of the splits that `classify_knn` compares, by several encoders at once, and what the vote says.

Shape legend: N images, D width, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stages.data.ahead import in_batches
from stages.data.images import decode
from stages.data.prepared import prepared
from stages.evaluate.classify_knn_settings import ClassifyKnnConfig
from stages.evaluate.vector_bank import VectorBank
from stages.evaluate.weighted_knn import accuracy, ranks, votes
from stages.models.encoder import Encoder
from stages.models.inference import RGB, Inference, centre_square, default_device

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact

TEST_BLOCK = 4096  # test images that are looked up together: a search reads all train vectors


@dataclass(frozen=True)
class SplitVectors:
    """The usable images of one split."""

    ids: list[int]
    keys: list[str]
    labels: Tensor  # (N,) int64
    by_encoder: dict[str, VectorBank]  # the suffix of the encoder's metrics -> (N, D), L2-normalised


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
    folder: Path,
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
        folder: for the files of the vectors; made here.
        batch_size: images of one forward pass.
        problems: grows by an entry for each image that cannot be decoded; that image is left out.
        report: called with the number of images encoded so far.
    """

    def prepare(row: Mapping[str, Any]) -> tuple[int, str, RGB]:
        return row["image_id"], str(row["key"]), centre_square(decode(row["image"]), config.resize, config.crop)

    inferences = {name: Inference(encoder, precision=config.precision) for name, encoder in encoders.items()}
    ids: list[int] = []
    keys: list[str] = []
    folder.mkdir()
    vectors = {name: VectorBank(folder / f"vectors{name}") for name in encoders}
    for batch in in_batches(prepared(images, ["key", "image"], prepare, set(labels), problems=problems), batch_size):
        ids += [image_id for image_id, _, _ in batch]
        keys += [key for _, key, _ in batch]
        for name, inference in inferences.items():
            vectors[name].append(inference.pooled([pixels for _, _, pixels in batch], config.pooling))
        report(len(ids))
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
    bank, device = train.by_encoder[encoder], default_device()
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for start, vectors_MD in test.by_encoder[encoder].blocks(TEST_BLOCK):
        similarity, rows = bank.nearest(vectors_MD.to(device), k)
        given = votes(similarity, train.labels.to(device)[rows], classes, temperature).cpu()
        # The same order as in `ranks`: where classes tie, the predicted one is the one of rank 0.
        predictions = given.argsort(dim=1, descending=True, stable=True)[:, 0]
        found.append((rows.cpu(), predictions, ranks(given, test.labels[start : start + len(given)])))
    neighbors, predictions, places = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Votes(neighbors, predictions, places)
