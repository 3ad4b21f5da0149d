"""Hummingbird against the golden file, which has void as class 0 in the memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.data.confusion import confusion, scores
from stages.evaluate.in_context import class_shares, recall_shares, segment
from stages.evaluate.weighted_knn import nearest
from tests.golden.golden import assert_close, load, tensors


def labels(masks: Tensor) -> Tensor:
    return torch.where(masks == 255, -1, masks)


def test_memory() -> None:
    golden = tensors("hummingbird")
    patch, classes = int(golden["patch"]), int(golden["classes"])
    shares = [class_shares(mask, patch, classes, void_as_background=True) for mask in labels(golden["train_masks"])]
    assert_close(torch.stack(shares).reshape(-1, classes), golden["all_memory_labels"], 1e-5)
    unit = torch.nn.functional.normalize(golden["train_features"].flatten(0, 1), dim=1)
    assert_close(unit, golden["all_memory_features"], 1e-5)


@pytest.mark.parametrize("memory", ["all", "sampled"])
def test_retrieval(memory: str) -> None:
    golden, arrays = tensors("hummingbird"), load("hummingbird")
    classes, k = int(golden["classes"]), int(golden["k"])
    queries = torch.nn.functional.normalize(golden["val_features"].flatten(0, 1), dim=1)
    similarity, rows = nearest(golden[f"{memory}_memory_features"], queries, k)
    shares = recall_shares(similarity, golden[f"{memory}_memory_labels"][rows], golden["beta"].item())
    assert_close(shares.reshape(4, 36, classes), golden[f"{memory}_label_hat"], 1e-5)
    matrix: Any = np.zeros((classes, classes), np.int64)
    for image, mask in enumerate(labels(golden["val_masks"])):
        found = segment(shares.reshape(4, 6, 6, classes)[image], *mask.shape)
        assert (found != golden[f"{memory}_prediction"][image]).sum() == 0
        matrix += confusion(mask.numpy(), found.numpy(), classes)
    assert np.allclose(scores(matrix).iou / 100, arrays[f"{memory}_iou_identity"], rtol=0, atol=1e-5)
    assert np.isclose(scores(matrix).miou / 100, arrays[f"{memory}_miou_identity"], rtol=0, atol=1e-5)
