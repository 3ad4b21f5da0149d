"""Segmentation scores against torchmetrics, and the rules for void pixels and absent classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_jaccard_index

from stages.data.confusion import confusion, scores


def test_counts_and_miou_equal_torchmetrics() -> None:
    generator = np.random.default_rng(0)
    truth, prediction = generator.integers(-1, 5, (40, 50)), generator.integers(0, 5, (40, 50))
    matrix = confusion(truth, prediction, 5)
    theirs = multiclass_confusion_matrix(torch.from_numpy(prediction), torch.from_numpy(truth), 5, ignore_index=-1)
    np.testing.assert_array_equal(matrix, theirs.numpy())
    miou = multiclass_jaccard_index(torch.from_numpy(prediction), torch.from_numpy(truth), 5, ignore_index=-1)
    assert scores(matrix).miou == pytest.approx(100 * float(miou))


def test_void_pixels_count_for_nothing() -> None:
    truth = np.array([[0, 1, -1, -1]])
    assert scores(confusion(truth, np.array([[0, 1, 0, 1]]), 2)).miou == 100
    with pytest.raises(ValueError, match="everything is void"):
        scores(confusion(np.full((2, 2), -1), np.zeros((2, 2), int), 2))


def test_a_class_nowhere_is_skipped_or_counts_zero() -> None:
    matrix = confusion(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 0]), 3)
    skip, zero = scores(matrix), scores(matrix, "zero")
    assert skip.miou == pytest.approx((200 / 3 + 50) / 2)
    assert zero.miou == pytest.approx((200 / 3 + 50) / 3)
    assert np.isnan(skip.iou[2])
    assert skip.pixel_accuracy == 75
    assert skip.mean_accuracy == 75


def test_a_class_predicted_but_absent_from_truth_counts() -> None:
    result = scores(confusion(np.array([0, 0]), np.array([0, 2]), 3))
    assert result.iou[2] == 0
    assert result.miou == 25
