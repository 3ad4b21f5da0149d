"""d3ssl on tiny backbones: terms, gradients, the bank, resume and ranks, and images that are not as they should be."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from stages.pretrain.data.batch import Batch
from stages.pretrain.methods.d3ssl.method import D3SSL
from stages.pretrain.methods.d3ssl.settings import D3SSLSettings
from stages.pretrain.methods.method import Step
from stages.pretrain.views.draw import generator
from stages.pretrain.views.plan import ImageRow
from tests.stages.pretrain.methods.ranks import Results, assert_alike, on_one_and_two, steps_of
from tests.stages.pretrain.methods.tiny import tiny_encoder, train_step

STEP = Step(index=3, total=10, steps_per_epoch=2)
SMALL: dict[str, Any] = {
    "boxes": "boxes",
    "size": 32,
    "small_size": 16,
    "proposals": 3,
    "min_side": 4,
    "roi_size": 4,
    "head": {"hidden": 24, "out": 16},
    "bank": {"size": 64},
}


def settings(**changes: Any) -> D3SSLSettings:
    return D3SSLSettings.model_validate(SMALL | changes)


def build(*, resnet: bool = False, **changes: Any) -> D3SSL:
    method = settings(**changes).build(tiny_encoder(resnet=resnet), total_steps=10, steps_per_epoch=2, global_batch=8)
    assert isinstance(method, D3SSL)
    for module in method.student.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0  # so that runs can be compared
    return method.train()


def image_row(image_id: int = 0, boxes: Any = None, width: int = 70, height: int = 50) -> ImageRow:
    array = None if boxes is None else np.asarray(boxes, np.float32).reshape(-1, 4)
    return ImageRow(image_id, width, height, lambda: np.zeros((height, width, 3), np.uint8), array)


def some_boxes(rng: np.random.Generator, width: int = 70, height: int = 50, count: int = 6) -> np.ndarray:
    low = rng.random((count, 2)) * [width - 30, height - 30]
    return np.concatenate([low, low + 18 + rng.random((count, 2)) * 12], 1).astype(np.float32)


def drawn_batch(config: D3SSLSettings, *, count: int = 8, first: int = 0, boxes: bool = True) -> Batch:
    """Real draws for made-up images; pixels are noise of each image's own generator."""
    plan = D3SSL.view_plan(_Bare(config))  # type: ignore[arg-type]
    assert plan.drawer is not None
    drawn = []
    for image_id in range(first, first + count):
        rng = generator(5, 0, 0, image_id)
        row = image_row(image_id, some_boxes(rng) if boxes else None)
        drawn.append((plan.drawer(rng, row), rng.standard_normal((2, 3, config.size, config.size)).astype(np.float32)))
    extras = {name: torch.from_numpy(np.stack([d.extras[name] for d, _ in drawn])) for name in drawn[0][0].extras}
    views = {
        name: torch.from_numpy(np.stack([p[i] for _, p in drawn]))[None] for i, name in enumerate(("whole", "crop"))
    }
    affines = {
        name: torch.from_numpy(np.stack([d.draws[i].affine for d, _ in drawn])).float()[None]
        for i, name in enumerate(("whole", "crop"))
    }
    return Batch(
        torch.arange(first, first + count),
        torch.zeros(count, dtype=torch.int64),
        views,
        affines,
        extras=extras,
        offset=first,
    )


class _Bare:
    def __init__(self, config: D3SSLSettings) -> None:
        self.settings = config


def sgd_step(method: D3SSL, batch: Batch, step: Step = STEP, lr: float = 0.1) -> dict[str, float]:
    return train_step(method, batch, torch.optim.SGD(method.trained_parameters(), lr=lr), step)


ABLATIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "no_cutout": {"cutout": {"kind": "none"}},
    "random_cutout": {"cutout": {"kind": "random"}},
    "fixed_threshold": {"cutout": {"threshold": 0.5}},
    "erase": {"mask": {"kind": "erase"}},
    "no_mask": {"mask": {"kind": "none"}},
    "contained": {"jitter": {"kind": "contained"}},
    "plain_jitter": {"jitter": {"kind": "plain"}},
    "no_jitter": {"jitter": {"kind": "none"}},
    "black": {"fill": -2.0},
    "masked_bank": {"bank": {"size": 64, "holds": "masked"}},
    "no_deposition": {"weights": {"deposition": 0}},
    "deposition_alone": {"weights": {"decouple": 0}},
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_terms_are_finite_and_reach_every_student_parameter_only(name: str) -> None:
    method = build(**ABLATIONS[name])
    batch = drawn_batch(method.settings)
    sgd_step(method, drawn_batch(method.settings, first=8), lr=1e-3)  # fills the bank: without negatives nothing pulls
    method.start_step(STEP)
    terms = method(batch)
    assert set(terms) == {term for term in D3SSLSettings.terms if method.settings.uses(term)}
    assert all(term.ndim == 0 and torch.isfinite(term) and term > 0 for term in terms.values()), terms
    torch.stack(list(terms.values())).sum().backward()
    silent = [
        name
        for name, parameter in method.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.abs().sum() > 0)
    ]
    assert silent == []
    assert all(not p.requires_grad and p.grad is None for p in method.teacher.parameters())
    assert all(np.isfinite(value) for value in method.diagnostics().values())


def test_the_ablations_change_the_terms() -> None:
    def value(name: str) -> float:
        method = build(**ABLATIONS[name])
        batch = drawn_batch(method.settings)
        sgd_step(method, batch, lr=0.0)
        return sum(sgd_step(method, batch, lr=0.0).values())

    values = {name: value(name) for name in ABLATIONS}
    assert len({round(v, 6) for v in values.values()}) == len(values), values


def test_resnet_regions_go_through_c5() -> None:
    method = build(resnet=True)
    batch = drawn_batch(method.settings)
    sgd_step(method, batch, lr=1e-3)
    method.start_step(STEP)
    torch.stack(list(method(batch).values())).sum().backward()
    for stage in ("conv1", "layer3", "layer4"):
        gradients = [p.grad for n, p in method.student.encoder.model.named_parameters() if n.startswith(stage)]
        assert gradients
        assert all(g is not None for g in gradients)
        assert any(g.abs().sum() > 0 for g in gradients)  # timm starts residual branches at zero
    assert method.encoder().model is method.student.encoder.model
    exported = build(resnet=True, export="teacher")
    assert exported.encoder().model is exported.teacher.encoder.model


def test_pooled_regions_are_those_of_each_box() -> None:
    """A region's vector hangs on its own box: moving one box changes one row."""
    method = build().eval()
    view, boxes = torch.randn(2, 3, 32, 32), torch.tensor([[[2.0, 2, 12, 12], [10, 4, 30, 20]]]).repeat(2, 1, 1)
    before = method.student(view, boxes)
    boxes[1, 0] = torch.tensor([16.0, 16, 30, 30])
    after = method.student(view, boxes)
    changed = (before - after).abs().amax(1) > 1e-6
    assert changed.tolist() == [False, False, True, False]
    torch.testing.assert_close(after.norm(dim=1), torch.ones(4))


def test_training_lowers_the_loss_and_the_teacher_follows() -> None:
    method = build(teacher={"momentum": 0.9})
    batches = [drawn_batch(method.settings, first=8 * i) for i in range(2)]
    sgd_step(method, batches[1], lr=0.0)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    optimizer = torch.optim.AdamW(method.trained_parameters(), lr=2e-3)
    totals = []
    for index in range(1, 21):
        method.start_step(Step(index, 1000, 1))
        total = torch.stack(list(method(batches[index % 2]).values())).sum()
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(Step(index, 1000, 1))
        totals.append(total.item())
    assert sum(totals[-4:]) < 0.9 * sum(totals[:4]), totals
    key = "encoder.model.blocks.0.attn.qkv.weight"
    student, teacher = method.state_dict()[f"student.{key}"], method.state_dict()[f"teacher.{key}"]
    assert 0 < (teacher - before[f"teacher.{key}"]).norm() < (student - before[f"student.{key}"]).norm()


@pytest.mark.parametrize("resnet", [False, True])
def test_half_precision_stays_near(resnet: bool) -> None:
    values = []
    for precise in (True, False):
        method = build(resnet=resnet)
        sgd_step(method, drawn_batch(method.settings, first=8), lr=0.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            terms = method(drawn_batch(method.settings))
        assert all(term.dtype == torch.float32 for term in terms.values())
        values.append(torch.stack(list(terms.values())).detach())
    torch.testing.assert_close(values[1], values[0], rtol=0.05, atol=0.05)


# ----------------------------------------------------------------------------------------------------------- the bank
def test_the_bank_is_first_in_first_out_and_filled_after_the_loss() -> None:
    method = build(bank={"size": 64})
    batch = drawn_batch(method.settings)
    first = sgd_step(method, batch, lr=0.0)
    assert first == {"decouple": 0.0, "deposition": 0.0}  # no past batch: no negatives
    assert int(method.bank_filled) == 48  # 8 images, 3 boxes, both teacher views
    old = method.bank.clone()
    assert sgd_step(method, batch, lr=0.0)["decouple"] > 0
    assert int(method.bank_filled) == 64
    assert int(method.bank_next) == 96 - 64
    torch.testing.assert_close(method.bank[32:48], old[32:48])
    assert (method.bank.norm(dim=1) - 1).abs().max() < 1e-5


def test_pushing_wraps_around_and_truncates() -> None:
    method = build(bank={"size": 5})
    rows = torch.arange(1, 20, dtype=torch.float32)[:, None].repeat(1, 16)
    method._push(rows[:3])
    assert method.bank[:, 0].tolist() == [1, 2, 3, 0, 0]
    method._push(rows[3:7])
    assert method.bank[:, 0].tolist() == [6, 7, 3, 4, 5]
    assert (int(method.bank_next), int(method.bank_filled)) == (2, 5)
    method._push(rows[7:19])  # more than the bank has rows: the last five
    assert sorted(method.bank[:, 0].tolist()) == [15, 16, 17, 18, 19]
    method._push(rows[:1])
    assert sorted(method.bank[:, 0].tolist()) == [1, 16, 17, 18, 19]


def test_a_batch_larger_than_the_bank_trains() -> None:
    method = build(bank={"size": 5})
    batch = drawn_batch(method.settings)
    sgd_step(method, batch)
    assert int(method.bank_filled) == 5
    assert all(np.isfinite(value) and value > 0 for value in sgd_step(method, batch).values())


def test_unused_rows_of_the_bank_are_no_negatives() -> None:
    method, other = build(), build()
    batch = drawn_batch(method.settings)
    for each in (method, other):
        sgd_step(each, batch, lr=0.0)
    other.bank[int(other.bank_filled) :] = 1.0
    assert sgd_step(method, batch, lr=0.0) == sgd_step(other, batch, lr=0.0)


@pytest.mark.parametrize("resnet", [False, True])
def test_resuming_continues_as_if_never_stopped(resnet: bool) -> None:
    batches = [drawn_batch(settings(), first=8 * i) for i in range(4)]
    whole = build(resnet=resnet)
    expected = [sgd_step(whole, batch, Step(i, 4, 2), lr=1e-2) for i, batch in enumerate(batches)]
    stopped = build(resnet=resnet)
    for i in range(2):
        sgd_step(stopped, batches[i], Step(i, 4, 2), lr=1e-2)
    resumed = build(resnet=resnet)
    assert set(resumed.state_dict()) == set(stopped.state_dict())
    resumed.load_state_dict(stopped.state_dict())
    assert [sgd_step(resumed, batches[i], Step(i, 4, 2), lr=1e-2) for i in (2, 3)] == expected[2:]
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_settings_say_what_is_wrong() -> None:
    with pytest.raises(ValidationError, match="boxes\n"):
        D3SSLSettings()
    with pytest.raises(ValidationError, match="112 does not divide size 200"):
        D3SSLSettings(boxes="b", size=200)
    with pytest.raises(ValidationError, match="every term weighs 0"):
        D3SSLSettings(boxes="b", weights={"decouple": 0, "deposition": 0})
    assert settings(boxes=["a", "b"]).boxes == ["a", "b"]


# -------------------------------------------------------------------------------------------------------------- ranks
def _share(batch: Batch, rank: int, world_size: int) -> Batch:
    size = len(batch) // world_size
    rows = slice(rank * size, (rank + 1) * size)
    return Batch(
        batch.image_ids[rows],
        batch.source[rows],
        {name: view[:, rows].double() for name, view in batch.views.items()},
        {name: affine[:, rows] for name, affine in batch.affines.items()},
        extras={name: extra[rows] for name, extra in batch.extras.items()},
        offset=batch.offset + rows.start,
    )


def _train(rank: int, world_size: int) -> Results:
    results: Results = {}
    for resnet in (False, True):
        method = build(resnet=resnet, bank={"size": 80}).double()
        batches = (
            _share(drawn_batch(method.settings, first=8 * index, boxes=index != 1), rank, world_size)
            for index in range(3)
        )
        steps = steps_of(method, batches, world_size, lr=0.05, find_unused_parameters=True)
        for index, step in enumerate(steps):
            counted = [int(count) for count in (method.bank_next, method.bank_filled, method.without_boxes)]
            results[f"{resnet}/{index}"] = step, method.bank.clone(), counted
    return results


@pytest.mark.slow
def test_two_ranks_give_the_terms_gradients_and_bank_of_one(tmp_path: Path) -> None:
    one, two = on_one_and_two(_train, tmp_path)
    for key, rank in itertools.product(one, range(2)):
        (step, bank, counted), (expected, expected_bank, expected_counts) = two[rank][key], one[key]
        assert_alike(key, step, expected, terms=(1e-7, 1e-9), gradients=(1e-6, 1e-6))
        torch.testing.assert_close(bank, expected_bank, rtol=1e-6, atol=1e-7)
        assert counted == expected_counts
