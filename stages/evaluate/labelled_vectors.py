"""The vectors of labelled images by split, from stored features.

Shape legend: N images, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.stage import Context
from stages.data.prepared import split_error
from stages.data.rows import iter_rows
from stages.evaluate.stored_features import NO_FEATURES, iter_features, require_some

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact

Pooling = Literal["vector", "mean"]


@dataclass(frozen=True)
class LabelledVectors:
    """The usable images of one split."""

    keys: list[str]
    vectors: Tensor  # (N, D) float32, as the encoder gave them
    labels: Tensor  # (N,) int64


@dataclass(frozen=True)
class LabelledSplits:
    """Train and test images, and what could not be used of them."""

    train: LabelledVectors
    test: LabelledVectors
    classes: list[str]
    problems: list[dict[str, str]]


def read_splits(context: Context, train_split: str, test_split: str, pooling: Pooling) -> LabelledSplits:
    """The labelled images of both splits.

    Args:
        context: of the stage; its inputs are `images` and `features`.
        train_split: the images that are learnt from.
        test_split: the images that are scored.
        pooling: "vector", what the encoder gives for the image; "mean", the mean of its patches.

    Raises: SourceError for a split without usable labelled images.
    """
    problems: list[dict[str, str]] = []
    train = read_split(context, "train_split", train_split, pooling, problems)
    test = read_split(context, "test_split", test_split, pooling, problems)
    return LabelledSplits(train, test, class_names(context.inputs["images"], train, test), problems)


def read_split(
    context: Context, option: str, split: str, pooling: Pooling, problems: list[dict[str, str]]
) -> LabelledVectors:
    """The labelled images of one split.

    Args:
        context: of the stage; its inputs are `images` and `features`.
        option: of the stage, which names the split.
        split: of the images.
        pooling: see `read_splits`.
        problems: grows by an entry for each image without features.

    Raises: SourceError for a split without usable labelled images.
    """
    labels, keys = _labels(context.name, context.inputs["images"], option, split)
    found = _vectors(context, labels, keys, pooling, problems)
    require_some(context.name, len(found.keys), f"{len(labels)} labelled images of split {split!r}", problems)
    return found


def class_names(images: Artifact, *splits: LabelledVectors) -> list[str]:
    """Names of the classes; those that nothing names are called by their number."""
    names = [str(name) for name in images.manifest.notes.get("classes", ())]
    count = 1 + max(int(split.labels.max()) for split in splits)
    return names + [str(number) for number in range(len(names), count)]


def _labels(stage: str, images: Artifact, option: str, split: str) -> tuple[dict[int, int], dict[int, str]]:
    labels, keys = {}, {}
    for row in iter_rows(images, ["key", "split", "label_id"]):
        if row["split"] == split and row["label_id"] is not None:
            labels[row["image_id"]], keys[row["image_id"]] = row["label_id"], str(row["key"])
    if not labels:
        remedy = (
            f"set stages.{stage}.{option} to a split that has, ingest class folders, or ingest with label: "
            "largest_object where there are boxes"
        )
        raise split_error(stage, images, split, "a label", remedy)
    return labels, keys


def _vectors(
    context: Context, labels: dict[int, int], keys: dict[int, str], pooling: Pooling, problems: list[dict[str, str]]
) -> LabelledVectors:
    ids, vectors = [], []
    for image in iter_features(context.inputs["features"], labels.keys(), patches=pooling == "mean"):
        ids.append(image.image_id)
        vectors.append(image.vector if image.map is None else image.map.mean(axis=(0, 1)))
    problems += [{"key": keys[missing], "reason": NO_FEATURES} for missing in sorted(labels.keys() - set(ids))]
    stacked = torch.from_numpy(np.stack(vectors)) if vectors else torch.empty(0, 0)
    return LabelledVectors([keys[i] for i in ids], stacked, torch.tensor([labels[i] for i in ids], dtype=torch.int64))
