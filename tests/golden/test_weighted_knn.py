"""Weighted k-NN against DINO's own evaluation and against a brute-force vote."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.evaluate.weighted_knn import accuracy, nearest, ranks, votes
from tests.golden.golden import load


def features(golden, name: str) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(golden[name]).double(), dim=1)


def vote(golden, k: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    similarity, rows = nearest(features(golden, "train"), features(golden, "test"), k)
    labels = torch.from_numpy(golden["y_train"])[rows]
    given = votes(similarity, labels, classes, float(golden["T"]))
    return given, ranks(given, torch.from_numpy(golden["y_test"]))


def test_votes_equal_the_brute_force() -> None:
    golden = load("eval_weighted_knn")
    given, rank = vote(golden, int(golden["k"]), golden["votes"].shape[1])
    np.testing.assert_allclose(given.numpy(), golden["votes"], rtol=1e-9, atol=1e-9)
    assert accuracy(rank, 1) == pytest.approx(float(golden["top1"]), abs=1e-9)
    assert accuracy(rank, 5) == pytest.approx(float(golden["top5"]), abs=100 / len(rank) + 1e-9)


@pytest.mark.parametrize("k", [10, 20, 100])
def test_accuracies_equal_dinos_evaluation(k: int) -> None:
    golden = load("dino_knn")
    _, rank = vote(golden, k, int(golden["num_classes"]))
    item = 100 / len(rank)
    assert accuracy(rank, 1) == pytest.approx(float(golden[f"top1_k{k}"]), abs=1e-9)
    assert accuracy(rank, 5) == pytest.approx(float(golden[f"top5_k{k}"]), abs=item + 1e-9)
