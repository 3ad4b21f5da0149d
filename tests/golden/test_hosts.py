"""The methods that DSA regularises against the golden files: their own losses, and lightly's as they configure them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from lightly.loss import VICRegLLoss
from torch import Tensor

from pipeline.config import registry
from stages.pretrain.methods.hosts.byol import byol_loss
from stages.pretrain.methods.hosts.losses.mae import mae_loss, patchify, random_masking
from stages.pretrain.methods.hosts.losses.moco import in_batch_contrast
from stages.pretrain.methods.hosts.losses.ressl import ressl_loss
from stages.pretrain.methods.hosts.losses.vicregl import ProjectedView, global_parts, local_parts
from stages.pretrain.methods.hosts.moco import queue_contrast
from stages.pretrain.methods.hosts.queue import Queue
from tests.golden.golden import assert_close, tensors
from tests.stages.pretrain.methods.tiny import tiny_encoder

SMALL = {"projector": {"hidden": 8, "out": 12}}


def method_of(name: str, **settings: Any) -> Any:
    """A registered method around a tiny encoder."""
    config = registry.load("tessera.methods", name)(**settings)
    return config.build(tiny_encoder(), total_steps=10, steps_per_epoch=2, global_batch=8)


def term_of(method: Any) -> Tensor:
    """Its only term. What it would compute from a batch has been replaced by what the file holds."""
    (term,) = method.compute_terms(None).values()
    return term


class Given(torch.nn.Module):
    """A predictor whose outputs are known, one call after the other."""

    def __init__(self, *outputs: Tensor) -> None:
        super().__init__()
        self.outputs = iter(outputs)

    def forward(self, projected: Tensor) -> Tensor:
        return next(self.outputs)


@pytest.mark.parametrize(
    ("name", "method", "settings"),
    [
        ("simclr_t0.1", "simclr", {"temperature": 0.1}),
        ("simclr_t0.5", "simclr", {"temperature": 0.5}),
        ("barlow", "barlow_twins", {}),
        ("vicreg", "vicreg", {}),
    ],
)
def test_two_view_methods(name: str, method: str, settings: dict[str, float]) -> None:
    golden = tensors("hosts_two_view")
    a, b = golden["a"].requires_grad_(), golden["b"].requires_grad_()
    built = method_of(method, **SMALL, **settings)
    built.project = lambda batch: [a, b]
    loss = term_of(built)
    loss.backward()
    assert_close(loss, golden[name], 1e-8)
    assert_close(a.grad, golden[f"{name}_grad_a"], 1e-8)
    assert_close(b.grad, golden[f"{name}_grad_b"], 1e-8)


@pytest.mark.parametrize("name", ["simsiam", "byol"])
def test_predictor_methods(name: str) -> None:
    golden = tensors("hosts_two_view")
    p1, p2 = golden["p1"].requires_grad_(), golden["p2"].requires_grad_()
    targets = [golden["z1"], golden["z2"]]
    method = method_of(name, **SMALL, predictor_hidden=8)
    method.project = lambda batch: targets
    method.targets = lambda batch: targets
    method.predictor = Given(p1, p2)
    loss = term_of(method)
    assert_close(loss, golden["byol_sym" if name == "byol" else name], 1e-8)
    if name == "byol":
        assert_close(byol_loss(p1, golden["z2"]), golden["byol_one_sided"], 1e-8)
    loss.backward()
    assert_close(p1.grad, golden[f"{name}_grad_p1"], 1e-8)
    assert_close(p2.grad, golden[f"{name}_grad_p2"], 1e-8)


@pytest.mark.parametrize("temperature", [0.07, 0.2])
def test_moco_with_a_queue(temperature: float) -> None:
    golden = tensors("moco_loss")
    queue = Queue(*golden["queue"].shape).double()
    queue.rows.copy_(golden["queue"])
    q = golden["q"].requires_grad_()
    loss = queue_contrast(queue, temperature)(q, golden["k"])
    assert_close(loss, golden[f"loss_T{temperature}"], 1e-8)
    assert_close(queue.rows, golden["queue"], 0.0)  # nothing is pushed by looking
    if temperature == 0.2:
        loss.backward()
        assert_close(q.grad, golden["grad_q_T0.2"], 1e-8)


def test_moco_v3_is_its_algorithm() -> None:
    golden = tensors("moco_loss")
    q, k = functional.normalize(golden["q"], dim=1), functional.normalize(golden["k"], dim=1)
    expected = torch.stack([-(q[i] @ k[i] / 0.2 - (k @ q[i] / 0.2).logsumexp(0)) for i in range(len(q))]).mean() * 0.4
    assert_close(in_batch_contrast(golden["q"], golden["k"], temperature=0.2), expected, 1e-10)
    halves = [in_batch_contrast(golden["q"][s : s + 4], golden["k"], first=s, temperature=0.2) for s in (0, 4)]
    assert_close(torch.stack(halves).mean(), expected, 1e-10)


@pytest.mark.parametrize("with_queue", [False, True])
def test_swav(with_queue: bool) -> None:
    golden = tensors("swav_loss")
    scores = [golden[f"scores{i}"].requires_grad_() for i in range(5)]
    high = int(golden["n_high"])
    queues = [golden["queue0"], golden["queue1"]] if with_queue else None
    loss = method_of("swav", **SMALL, prototypes=7).loss(scores[:high], scores[high:], queues).squeeze()
    assert_close(loss, golden["loss_queue" if with_queue else "loss"], 1e-8)
    if not with_queue:
        loss.backward()
        for i, score in enumerate(scores):
            assert_close(score.grad, golden[f"grad{i}"], 1e-8)


def _vicregl_views(golden: dict[str, Tensor], names: str) -> list[ProjectedView]:
    return [
        ProjectedView(golden[f"{n}{i}"], golden[f"{n}{i}_map"].flatten(1, 2), golden[f"{n}{i}_grid"].flatten(1, 2))
        for n in names
        for i in range(2)
    ]


def test_vicregl_equals_the_official_code() -> None:
    golden = tensors("vicregl_loss")
    views, matches = _vicregl_views(golden, "g"), tuple(golden["num_matches"].tolist())
    whole, local = global_parts(views), local_parts(views, num_matches=matches)
    for name, parts in (("global", whole), ("local", local)):
        assert_close(25 * parts.invariance, golden[f"official_{name}_inv"], 1e-5)
        assert_close(25 * parts.variance, golden[f"official_{name}_var"], 1e-5)
        assert_close(parts.covariance, golden[f"official_{name}_cov"], 1e-5)
    alpha = golden["alpha"].item()
    total = alpha * whole.weighted(25, 25, 1) + (1 - alpha) * local.weighted(25, 25, 1)
    assert_close(total, golden["official_total"], 1e-5)


@pytest.mark.parametrize("with_local", [False, True])
def test_vicregl_in_lightlys_slot_order(with_local: bool) -> None:
    golden = tensors("vicregl_loss")
    views, others = _vicregl_views(golden, "g"), _vicregl_views(golden, "l") if with_local else []
    matches, alpha = tuple(golden["num_matches"].tolist()), golden["alpha"].item()
    local = local_parts(views, others, num_matches=matches, order="distance").weighted(25, 25, 1)
    total = alpha * global_parts(views, others).weighted(25, 25, 1) + (1 - alpha) * local
    expected = golden["lightly_with_local" if with_local else "lightly_two_global"]
    assert_close(total, expected, 1e-5)

    def pack(names: str) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
        pairs = [(golden[f"{names}{i}"], golden[f"{names}{i}_map"]) for i in range(2)]
        return pairs, [golden[f"{names}{i}_grid"] for i in range(2)]

    theirs = VICRegLLoss(num_matches=matches, alpha=alpha)(*pack("g"), *(pack("l") if with_local else ()))
    assert_close(theirs.squeeze(), expected, 1e-5)


def test_mae() -> None:
    golden = tensors("mae_loss")
    side = int(golden["patch"])
    kept, mask, restore = random_masking(golden["noise"], ratio=0.75)
    assert torch.equal(mask, golden["mask"].to(mask.dtype))
    assert torch.equal(restore, golden["ids_restore"].long())
    tokens = golden["tokens"]
    assert_close(tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[2])), golden["tokens_kept"], 0.0)
    assert_close(patchify(golden["images"], side), golden["patchified"], 0.0)
    for normalise in (0, 1):
        loss = mae_loss(golden["pred"], golden["images"], mask, side=side, normalise=bool(normalise))
        assert_close(loss, golden[f"loss_normpix{normalise}"], 1e-8)


def test_ressl() -> None:
    golden = tensors("ressl_loss")
    student = golden["z_student_raw"].requires_grad_()
    tau_s, tau_t = golden["tau_s"].item(), golden["tau_t"].item()
    loss = ressl_loss(student, golden["z_teacher"], golden["queue"], tau_s=tau_s, tau_t=tau_t)
    loss.backward()
    assert_close(loss, golden["loss"], 1e-10)
    assert_close(student.grad, golden["grad_student"], 1e-10)
