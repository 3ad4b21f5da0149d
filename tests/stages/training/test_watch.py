"""Watching a training: ranks and cosines of made-up features, gradient norms against autograd's own, when it stops."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.errors import StageFailed
from stages.pretrain.data.batch import Batch
from stages.pretrain.methods.method import Step
from stages.training.checkpoint import CheckpointFolder
from stages.training.loop import BadStep, train
from stages.training.settings import WatchSettings
from stages.training.watch import Watch, effective_rank, mean_pairwise_cosine, not_finite
from tests.stages.training.test_loop import IMAGES, Toy, make_training


def test_effective_rank_counts_directions() -> None:
    assert effective_rank(torch.eye(6)).item() == pytest.approx(6)
    assert effective_rank(3 * torch.eye(9)[:4]).item() == pytest.approx(4)
    alike = torch.arange(1.0, 6.0)[:, None] * torch.randn(1, 7)
    assert effective_rank(alike).item() == pytest.approx(1, abs=1e-4)
    assert effective_rank(torch.zeros(4, 3)).item() == 0
    assert effective_rank(torch.full((4, 3), math.nan)).item() == 0


def test_effective_rank_is_the_entropy_of_the_singular_values() -> None:
    for rows in (torch.randn(20, 5), torch.randn(5, 20)):
        share = torch.linalg.svdvals(rows.double())
        share = share / share.sum()
        expected = math.exp(-(share * share.log()).sum().item())
        assert effective_rank(rows).item() == pytest.approx(expected, rel=1e-5)


def test_mean_pairwise_cosine_leaves_out_a_row_and_itself() -> None:
    rows = torch.randn(9, 4)
    unit = torch.nn.functional.normalize(rows, dim=1)
    slow = [float(unit[i] @ unit[j]) for i in range(9) for j in range(9) if i != j]
    assert mean_pairwise_cosine(rows).item() == pytest.approx(sum(slow) / len(slow), abs=1e-6)
    assert mean_pairwise_cosine(torch.ones(3, 4)).item() == pytest.approx(1)
    assert math.isnan(mean_pairwise_cosine(torch.ones(1, 4)).item())


def test_a_row_has_each_terms_weight_and_gradient_norm_when_due(tmp_path: Path) -> None:
    state = train(make_training(6, watch={"gradients_every": 3}), CheckpointFolder(tmp_path, "f"))
    measured = [row["step"] for row in state.curves if "grad_norm/predict" in row]
    assert measured == [1, 4]  # steps are counted from 0, rows from 1
    row = state.curves[0]
    assert (row["weight/predict"], row["weight/shrink"]) == (1.0, 0.1)

    method = Toy()
    torch.manual_seed(0)
    method.train().start_step(Step(0, 6, 4))
    batch = Batch(torch.arange(8), torch.zeros(8), {"global": IMAGES[:8].transpose(0, 1)}, {})
    (0.1 * method.compute_terms(batch)["shrink"]).backward()
    expected = torch.stack([p.grad.norm() for p in method.student.parameters()]).norm().item()
    assert row["grad_norm/shrink"] == pytest.approx(expected, rel=1e-5)


def test_measuring_gradients_changes_nothing(tmp_path: Path) -> None:
    watched = train(make_training(watch={"gradients_every": 1}), CheckpointFolder(tmp_path / "a", "f"))
    alone = train(make_training(watch={"gradients_every": 0}), CheckpointFolder(tmp_path / "b", "f"))
    assert [row["total"] for row in watched.curves] == [row["total"] for row in alone.curves]
    assert "grad_norm/predict" not in alone.curves[0]


class Collapsing(Toy):
    """All images become the same vector from step 5 on."""

    def after_step(self, step: Step) -> None:
        super().after_step(step)
        if step.index == 5:
            with torch.no_grad():
                self.student[1].weight.zero_()
                self.student[4].weight.zero_()


def test_a_collapse_stops_the_training_once_it_has_lasted(tmp_path: Path) -> None:
    left: list[BadStep] = []

    def leave(bad: BadStep) -> str:
        left.append(bad)
        return "To run it again: ..."

    training = make_training(20, Collapsing(), watch={"patience": 2, "grace": 0}, optimizer={"lr": 1e-9, "lr_end": 0.0})
    message = (
        r"collapsed: rank_image is 1(\.\d+)? at step 7, below watch.min_rank \(1.2\) for 2 consecutive rows.*again"
    )
    with pytest.raises(StageFailed, match=message):
        train(training, CheckpointFolder(tmp_path, "f"), leave_replay=leave)
    assert [bad.step for bad in left] == [7]
    assert [len(ids) for ids in left[0].image_ids] == [8]


def test_no_collapse_is_looked_for_in_the_grace_or_with_a_limit_of_zero(tmp_path: Path) -> None:
    still = {"optimizer": {"lr": 1e-9, "lr_end": 0.0}}
    train(make_training(12, Collapsing(), watch={"grace": 12}, **still), CheckpointFolder(tmp_path / "a", "f"))
    no_limit = {"min_rank": 0, "grace": 0}
    train(make_training(12, Collapsing(), watch=no_limit, **still), CheckpointFolder(tmp_path / "b", "f"))
    with pytest.raises(StageFailed, match="collapsed"):
        train(make_training(12, Collapsing(), watch={"grace": 0}, **still), CheckpointFolder(tmp_path / "c", "f"))


def wrong(watch: Watch, step: int, values: Tensor, norm: float, **seen: float) -> str | None:
    norm_now = torch.tensor(norm)
    finite = not not_finite(values, norm_now)
    return watch.wrong(step, ["term", "total"], values, norm_now, seen, finite=finite)


def test_entropy_has_a_limit_of_its_own_and_one_good_row_forgives() -> None:
    watch = Watch(WatchSettings(min_entropy=0.5, patience=2, grace=0), {})
    fine = torch.ones(1, 2)
    rows = [0.4, 0.6, 0.4, 0.3]
    said = [wrong(watch, i, fine, 1.0, rank_image=9.0, teacher_entropy=e) for i, e in enumerate(rows)]
    assert said[:3] == [None] * 3
    assert said[3] is not None
    assert "teacher_entropy is 0.3 at step 3, below watch.min_entropy (0.5)" in said[3]


def test_a_gradient_that_is_not_finite_is_told_from_a_term() -> None:
    watch = Watch(WatchSettings(), {})
    assert "gradient's norm is inf while every term is finite at step 3" in str(
        wrong(watch, 3, torch.ones(1, 2), math.inf)
    )
    assert "term total is inf at step 3" in str(wrong(watch, 3, torch.tensor([[1.0, math.inf]]), 1.0))
    assert wrong(watch, 3, torch.ones(1, 2), 1.0) is None
