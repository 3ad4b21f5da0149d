"""The methods that DSA regularises: terms, gradients, resume, queues, ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from stages.pretrain.config.method import method_settings
from stages.pretrain.methods.hosts.queue import Queue
from stages.pretrain.methods.hosts.vicregl import cell_centres
from stages.pretrain.methods.method import Step
from stages.pretrain.views.geometry import crop_affine
from tests.stages.pretrain.methods.ranks import Results
from tests.stages.pretrain.methods.tiny import share, train_step
from tests.stages.pretrain.methods.tiny_hosts import (
    HOSTS,
    STEP,
    a_batch,
    assert_ranks_train_alike,
    build,
    settings,
    silent,
    train_on_rank,
)


@pytest.mark.parametrize("name", HOSTS)
def test_terms_are_finite_and_every_trained_parameter_learns(name: str) -> None:
    config = settings(name)
    method = build(config)
    method.start_step(STEP)
    terms = method(a_batch())
    assert tuple(terms) == config.terms == tuple(config.term_weights())
    assert all(term.ndim == 0 and torch.isfinite(term) for term in terms.values()), terms
    sum(terms.values()).backward()
    assert silent(method) == []
    frozen = [parameter for parameter in method.parameters() if not parameter.requires_grad]
    assert all(parameter.grad is None for parameter in frozen)
    assert bool(frozen) == (name in {"moco_v2", "moco_v3", "byol", "ressl"})


@pytest.mark.parametrize("name", [name for name in HOSTS if name != "mae"])
def test_a_resnet_works_too(name: str) -> None:
    method = build(settings(name), resnet=True)
    method.start_step(STEP)
    terms = method(a_batch())
    assert all(torch.isfinite(term) for term in terms.values())
    sum(terms.values()).backward()
    gradients = [p.grad for n, p in method.named_parameters() if "encoder" in n or "student" in n]
    assert gradients[0] is not None
    assert gradients[0].abs().sum() > 0  # of the first convolution


@pytest.mark.parametrize("name", HOSTS)
def test_training_lowers_the_loss(name: str) -> None:
    method, batch = build(settings(name)), a_batch()
    optimizer = torch.optim.AdamW(method.trained_parameters(), lr=3e-3)
    queues = {queue: queue.rows.clone() for queue in method.modules() if isinstance(queue, Queue)}
    totals = []
    for index in range(12):
        for queue, rows in queues.items():
            queue.rows.copy_(rows)  # this very batch in the queue would make every step's task harder than the last
        totals.append(sum(train_step(method, batch, optimizer, Step(index, 1000, 500)).values()))
    first, last = sum(totals[:3]) / 3, sum(totals[-3:]) / 3
    assert last < first - 0.1 * abs(first), totals


@pytest.mark.parametrize("name", HOSTS)
def test_state_round_trips_with_queues_and_averages(name: str) -> None:
    method, batch = build(settings(name)), a_batch()
    optimizer = torch.optim.SGD(method.trained_parameters(), lr=0.05)
    for index in range(3):
        train_step(method, batch, optimizer, Step(index, 10, 2))
    torch.manual_seed(99)
    resumed = build(settings(name))
    for queue in (module for module in resumed.modules() if isinstance(module, Queue)):
        queue.rows.normal_()
    resumed.load_state_dict(method.state_dict())
    for each in (method, resumed):
        each.start_step(STEP)
    first, second = method(batch), resumed(batch)
    assert all(torch.equal(first[term], second[term]) for term in first)


def test_predictors_and_averages_are_where_the_papers_have_them() -> None:
    byol, simsiam, v3 = (build(settings(name)) for name in ("byol", "simsiam", "moco_v3"))
    assert simsiam.teacher is None
    assert byol.teacher is not None
    for name in ("moco_v2", "moco_v3", "byol", "ressl"):
        averaged, config = build(settings(name)), settings(name).model_copy(update={"export": "teacher"})
        assert averaged.encoder() is averaged.network.encoder
        averaged = build(config)
        assert averaged.encoder() is averaged.teacher.encoder
    assert v3.temperature == 0.2
    assert build(settings("moco_v3"), resnet=True).temperature == 1.0
    before = byol.teacher.projector[0].weight.clone()
    with torch.no_grad():
        byol.network.projector[0].weight.add_(1.0)
    byol.after_step(Step(0, 10, 5))
    torch.testing.assert_close(byol.teacher.projector[0].weight, before + 0.004)


@pytest.mark.parametrize("rows", [3, 8, 20, 50])
def test_a_queue_holds_the_newest_whatever_the_batch(rows: int) -> None:
    queue = Queue(20, 4)
    pushed = nn.functional.normalize(torch.randn(3 * rows, 4), dim=1)
    for part in pushed.split(rows):
        queue.push(part * 3)
    expected = pushed[-20:]
    assert len(queue.rows) == 20
    for row in expected:
        assert (queue.rows - row).abs().sum(dim=1).min() < 1e-5
    assert int(queue.position) == 3 * min(rows, 20) % 20


def test_swav_uses_its_queue_once_it_is_full_and_freezes_prototypes() -> None:
    config = method_settings({**HOSTS["swav"], "queue_from_epoch": 1, "freeze_prototypes": 2})
    method, batch = build(config), a_batch()
    optimizer = torch.optim.SGD(method.trained_parameters(), lr=0.5)
    used = []
    for index in range(6):
        before = method.prototypes.weight.detach().clone()
        train_step(method, batch, optimizer, Step(index, 10, 2))
        used.append(method.use_queue)
        moved = (method.prototypes.weight - nn.functional.normalize(before, dim=1)).abs().max() > 1e-4
        assert moved == (index >= 2)
    assert used == [False, False, False, False, True, True]  # epoch 1 starts at step 2; 16 entries are two batches


def test_cells_know_where_they_are_in_the_image() -> None:
    affine = torch.stack([crop_affine(torch.tensor([10.0, 20.0, 30.0, 60.0]), 8, flip=flip) for flip in (False, True)])
    places = cell_centres(affine.float(), 8, 2, 2)
    assert places[0].tolist() == [[15, 30], [25, 30], [15, 50], [25, 50]]
    assert places[1].tolist() == [[25, 30], [15, 30], [25, 50], [15, 50]]


def test_mae_masks_do_not_hang_on_the_rank() -> None:
    method, batch = build(settings("mae", dsa=True)).host, a_batch()
    whole = method._noise(batch)
    parts = [method._noise(share(batch, rank, 2)) for rank in range(2)]
    assert whole.shape == (2, 8, 64)
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_rules_are_named() -> None:
    with pytest.raises(ValueError, match="only a plain ViT"):
        build(settings("mae"), resnet=True)


# ------------------------------------------------------------------------------------------------------------- ranks
def _train(rank: int, world_size: int) -> Results:
    return train_on_rank(((name, settings(name)) for name in HOSTS), rank, world_size)


@pytest.mark.slow
def test_two_ranks_give_the_terms_and_gradients_of_one(tmp_path: Path) -> None:
    assert_ranks_train_alike(_train, tmp_path)
