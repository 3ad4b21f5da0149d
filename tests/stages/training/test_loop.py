"""The loop with a toy method: resume equals never stopped, accumulation equals one batch, bad terms stop it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import StageFailed
from stages.models.encoder import Features
from stages.pretrain.data.batch import Batch
from stages.pretrain.methods.method import Method, Step
from stages.pretrain.views.plan import ViewPlan, ViewSpec
from stages.training.checkpoint import CheckpointFolder, TrainingState
from stages.training.loop import Training, TrainingInterrupted, train, weighted_sum
from stages.training.notice import Notice
from stages.training.settings import LoopSettings

IMAGES = torch.randn(64, 1, 3, 8, 8, generator=torch.Generator().manual_seed(5))


class ToyEncoder(nn.Module):
    """What the loop asks of an encoder: vectors and a map."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> Features:
        vector = self.student(images)
        return Features(vector, vector[:, :, None, None])


class Toy(Method):
    """Predicts the teacher's output for the same view; the teacher is a moving average, the queue a buffer."""

    def __init__(self, poison_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.student = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 4))
        self.teacher = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(4, 4))
        self.poison_at, self.index = poison_at, 0

    def view_plan(self) -> ViewPlan:
        return ViewPlan((ViewSpec("global", size=8),))

    def start_step(self, step: Step) -> None:
        self.index = step.index

    def compute_terms(self, batch: Batch) -> dict[str, Tensor]:
        view = batch.views["global"][0]
        predict = (self.student(view) - self.teacher(view)).pow(2).mean()
        if self.index == self.poison_at:
            predict = predict * float("nan")
        return {"predict": predict, "shrink": self.student(view).pow(2).mean()}

    def after_step(self, step: Step) -> None:
        with torch.no_grad():
            self.queue += 1
            self.teacher[1].weight.mul_(0.99)

    def encoder(self):  # type: ignore[no-untyped-def]
        return ToyEncoder(self.student)


class ToyData:
    def __init__(self, share: int) -> None:
        self.share = share

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        for i in range(start, stop):
            ids = torch.arange(i * self.share, (i + 1) * self.share) % len(IMAGES)
            yield Batch(
                ids,
                torch.zeros_like(ids),
                {"global": IMAGES[ids].transpose(0, 1)},
                {},
                skipped={"blurred": 1},
                problems={f"{i}.jpg": "blurred"},
            )


def make_training(steps: int = 12, method: Method | None = None, **settings: object) -> Training:
    config = LoopSettings.model_validate({"steps": steps, "batch_size": 8, "log_every": 1, **settings})
    data = ToyData(config.batch_size // config.accumulate)
    return Training(method or Toy(), data, config, {"shrink": 0.1}, steps, 4, torch.device("cpu"))


class StopAt(CheckpointFolder):
    """A process that dies right after the checkpoint of step `stop`."""

    def __init__(self, folder: Path, stop: int) -> None:
        super().__init__(folder, "f")
        self.stop = stop

    def save(self, method: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState) -> None:
        super().save(method, optimizer, state)
        if state.step == self.stop:
            raise KeyboardInterrupt


def curve(state: TrainingState) -> list[tuple[float, float, float]]:
    return [(row["step"], row["predict"], row["total"]) for row in state.curves]


def test_training_lowers_the_loss_and_repeats_bit_for_bit(tmp_path: Path) -> None:
    first = train(make_training(40), CheckpointFolder(tmp_path / "a", "f"))
    second = train(make_training(40), CheckpointFolder(tmp_path / "b", "f"))
    assert curve(first) == curve(second)
    assert first.curves[-1]["total"] < 0.8 * first.curves[0]["total"]
    assert first.skipped == {"blurred": 40}
    assert first.problems == {f"{i}.jpg": "blurred" for i in range(40)}


def test_stopped_and_resumed_equals_never_stopped(tmp_path: Path) -> None:
    whole_training = make_training(checkpoint_every=5)
    whole = train(whole_training, CheckpointFolder(tmp_path / "whole", "f"))
    with pytest.raises(KeyboardInterrupt):
        train(make_training(checkpoint_every=5), StopAt(tmp_path / "cut", 5))
    resumed_training = make_training(checkpoint_every=5)
    resumed = train(resumed_training, CheckpointFolder(tmp_path / "cut", "f"))
    assert curve(resumed) == curve(whole)
    assert (resumed.skipped, resumed.problems) == (whole.skipped, whole.problems)
    for name, value in whole_training.method.state_dict().items():
        assert torch.equal(value, resumed_training.method.state_dict()[name]), name


def test_a_stop_between_two_rows_leaves_no_trace_in_the_curves(tmp_path: Path) -> None:
    settings = {"checkpoint_every": 5, "log_every": 4, "watch": {"gradients_every": 3}}
    whole = train(make_training(**settings), CheckpointFolder(tmp_path / "whole", "f"))
    with pytest.raises(KeyboardInterrupt):
        train(make_training(**settings), StopAt(tmp_path / "cut", 5))
    resumed = train(make_training(**settings), CheckpointFolder(tmp_path / "cut", "f"))
    assert [row["step"] for row in whole.curves] == [4, 8, 12]
    assert [row | {"images_per_s": 0} for row in resumed.curves] == [row | {"images_per_s": 0} for row in whole.curves]
    assert (resumed.skipped, resumed.problems) == (whole.skipped, whole.problems)


def test_the_row_of_an_early_stop_leaves_no_trace_in_what_goes_on(tmp_path: Path) -> None:
    whole = train(make_training(log_every=4), CheckpointFolder(tmp_path / "whole", "f"))
    stopped = train(make_training(log_every=4, stop_at=6), CheckpointFolder(tmp_path / "cut", "f"))
    again = train(make_training(log_every=4, stop_at=6), CheckpointFolder(tmp_path / "cut", "f"))
    assert [row["step"] for row in stopped.curves] == [row["step"] for row in again.curves] == [4, 6]
    assert curve(train(make_training(log_every=4), CheckpointFolder(tmp_path / "cut", "f"))) == curve(whole)


def test_a_notice_saves_at_once_and_a_last_one_stops(tmp_path: Path) -> None:
    whole = train(make_training(), CheckpointFolder(tmp_path / "whole", "f"))
    told = iter([Notice.NONE, Notice.SAVE, Notice.NONE, Notice.LEAVE])
    with pytest.raises(TrainingInterrupted, match="step 4 is saved"):
        train(make_training(), CheckpointFolder(tmp_path / "cut", "f"), notices=lambda: next(told))
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["step-00000002", "step-00000004"]
    assert curve(train(make_training(), CheckpointFolder(tmp_path / "cut", "f"))) == curve(whole)


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    class Still(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.student[3] = nn.Identity()  # dropout draws once a forward pass, so it would tell the two apart

    one = train(make_training(method=Still()), CheckpointFolder(tmp_path / "one", "f"))
    four = train(make_training(method=Still(), accumulate=4), CheckpointFolder(tmp_path / "four", "f"))
    torch.testing.assert_close(torch.tensor(curve(one)), torch.tensor(curve(four)), atol=1e-6, rtol=1e-5)


def test_a_term_that_is_not_finite_is_named_with_its_step(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match=r"term predict is nan at step 4"):
        train(make_training(method=Toy(poison_at=4), log_every=10), CheckpointFolder(tmp_path, "f"))


def test_unnamed_terms_weigh_one() -> None:
    terms = {"a": torch.tensor(2.0), "b": torch.tensor(3.0)}
    assert weighted_sum(terms, {"b": 0.5}).item() == 3.5
    with pytest.raises(ValueError, match="at least one term"):
        weighted_sum({}, {})
