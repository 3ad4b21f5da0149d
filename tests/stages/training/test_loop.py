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
from stages.training.checkpoint import CheckpointFolder, TrainingState, is_complete
from stages.training.loop import Training, train, weighted_sum
from stages.training.optim import build_optimizer, clip_gradients, set_schedule
from stages.training.settings import LoopSettings, OptimizerSettings

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


def test_a_broken_checkpoint_is_passed_over(tmp_path: Path) -> None:
    whole = train(make_training(checkpoint_every=3), CheckpointFolder(tmp_path / "whole", "f"))
    with pytest.raises(KeyboardInterrupt):
        train(make_training(checkpoint_every=3), StopAt(tmp_path / "cut", 6))
    newest = tmp_path / "cut" / "step-00000006"
    data = bytearray((newest / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (newest / "state.pt").write_bytes(data)
    said: list[str] = []
    assert not is_complete(newest)
    resumed = train(make_training(checkpoint_every=3), CheckpointFolder(tmp_path / "cut", "f", say=said.append))
    assert curve(resumed) == curve(whole)
    assert "step-00000006" in said[0]


def test_a_checkpoint_of_another_artifact_is_refused(tmp_path: Path) -> None:
    train(make_training(3), CheckpointFolder(tmp_path, "f"))
    with pytest.raises(ValueError, match="belongs to f, not to other"):
        train(make_training(3), CheckpointFolder(tmp_path, "other"))


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


def test_weight_decay_spares_biases_and_norms() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    decayed, plain = build_optimizer(module, OptimizerSettings(weight_decay=0.3)).param_groups
    assert [p.ndim for p in decayed["params"]] == [2]
    assert len(plain["params"]) == 3
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_schedule_reaches_the_groups(name: str) -> None:
    settings = OptimizerSettings(name=name, lr=0.1, lr_per=256, lr_end=0.0, weight_decay=0.1, weight_decay_end=0.2)
    optimizer = build_optimizer(nn.Linear(4, 4), settings)
    lr, decay = set_schedule(optimizer, settings, step=0, total=10, steps_per_epoch=5, batch_size=512)
    assert (lr, decay) == (pytest.approx(0.2), pytest.approx(0.1))
    lr, decay = set_schedule(optimizer, settings, step=5, total=10, steps_per_epoch=5, batch_size=512)
    assert (lr, decay) == (pytest.approx(0.1), pytest.approx(0.15))
    assert optimizer.param_groups[0]["lr"] == lr
    assert optimizer.param_groups[1]["weight_decay"] == 0.0


def test_clipping_is_by_tensor_or_over_all() -> None:
    def gradients(mode: str) -> list[float]:
        parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
        parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4])
        total = clip_gradients(parameters, OptimizerSettings(clip=1.0, clip_mode=mode))
        assert total.item() == pytest.approx((25 + 0.25) ** 0.5)
        return [parameter.grad.norm().item() for parameter in parameters]

    assert gradients("tensor") == pytest.approx([1.0, 0.5], abs=1e-5)
    assert gradients("global") == pytest.approx([5 / 25.25**0.5, 0.5 / 25.25**0.5], abs=1e-5)
