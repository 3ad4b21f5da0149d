"""FLSL against the released code: mean-shift, terms, the whole way through the head, sampling, bbox-aligned k-NN."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.evaluate.bbox_knn_votes import best_places, object_patches
from stages.evaluate.weighted_knn import accuracy
from stages.models.heads import ProjectionHead
from stages.pretrain.methods.flsl.losses.flsl_loss import inter_view, intra_view, volume
from stages.pretrain.methods.flsl.losses.mean_shift import attend, mean_shift, mixed, sharpened
from stages.pretrain.methods.flsl.query_sampling import window_queries
from stages.training.schedules import linear_warmup
from tests.golden.golden import assert_close, load, tensors

WEIGHTS = {"intra": 0.03, "inter": 1.0, "vmr": 5.0}


def queries(tokens_BND: Tensor, mask_BN: Tensor) -> Tensor:
    return tokens_BND[mask_BN].reshape(len(tokens_BND), -1, tokens_BND.shape[-1])


def loss(queries_RD: Tensor, modes_RD: Tensor, student_RK: Tensor, teacher_RK: Tensor, temp_t: float) -> dict:
    log_p = torch.log_softmax(student_RK / 0.1, dim=-1)
    terms = {
        "intra": intra_view(queries_RD, modes_RD).mean(),
        "inter": inter_view(log_p, torch.softmax(teacher_RK / temp_t, dim=-1)).mean(),
        "vmr": volume(log_p.exp().mean(dim=0)),
    }
    return terms | {"total": sum(WEIGHTS[name] * term for name, term in terms.items())}


def test_mean_shift_modes_and_their_gradient() -> None:
    golden = tensors("flsl_meanshift")
    tokens = golden["enc_s"].requires_grad_()
    query = queries(tokens, golden["mask"])
    sa, ca = golden["sa_temp"].item(), golden["ca_temp"].item()
    assert (sa, ca) == pytest.approx((0.3 / 24**0.5, 0.6 / 24**0.5))
    mode_sa, mode_ca = mean_shift(query, tokens, sa), mean_shift(query, golden["enc_t"], ca)
    assert_close(query, golden["query"], 1e-10)
    assert_close(mode_sa, golden["mode_sa"], 1e-10)
    assert_close(mode_ca, golden["mode_ca"], 1e-10)
    ((mode_sa * golden["cot_sa"]).sum() + (mode_ca * golden["cot_ca"]).sum()).backward()
    assert_close(tokens.grad, golden["grad_enc_s"], 1e-10)


def test_multi_stage_attention() -> None:
    golden = tensors("flsl_meanshift")
    keys = golden["enc_t"]
    attention = attend(golden["query"], keys, golden["ca_temp"].item())
    mask = sharpened(attention, 10.0)
    assert_close(mask, golden["attn_map_sharp10"], 1e-10)
    assert_close(torch.bmm(mixed(attention, mask, 0.3), keys), golden["mode_ca_mixture03"], 1e-10)


@pytest.mark.parametrize("epoch", [0, 15, 299])
def test_terms_and_gradients(epoch: int) -> None:
    golden = tensors("flsl_loss")
    assert [*WEIGHTS.values()] == golden["coefficients"].tolist()
    temp_t = linear_warmup(epoch, 0.04, 0.07, 30)
    assert temp_t == pytest.approx(golden[f"ep{epoch}_temp_t"].item(), abs=1e-12)
    leaves = {"x": golden["x"], "mode": golden["mode"], "student": golden["student_logits"]}
    for leaf in leaves.values():
        leaf.requires_grad_()
    teacher = golden["teacher_logits"].requires_grad_()
    terms = loss(leaves["x"], leaves["mode"], leaves["student"], teacher, temp_t)
    for name, value in terms.items():
        assert_close(value, golden[f"ep{epoch}_{name}"], 1e-10)
    terms["total"].backward()
    for name, leaf in leaves.items():
        assert_close(leaf.grad, golden[f"ep{epoch}_grad_{name}"], 1e-10)
    assert teacher.grad is None


def test_volume_with_a_prior() -> None:
    golden = tensors("flsl_loss")
    mean = torch.softmax(golden["student_logits"] / golden["temp_s"], dim=-1).mean(dim=0)
    assert_close(volume(mean, golden["prior"][0].log()), golden["vmr_nonuniform_prior"], 1e-10)
    assert_close(volume(mean, torch.full_like(mean, 1 / 13).log()), golden["ep0_vmr"], 1e-10)


def head(golden: dict[str, Tensor], name: str) -> ProjectionHead:
    """Our head with the weights of a weight-normalised one whose gains are 1."""
    assert (golden[f"{name}.last_layer.weight_g"] == 1).all()
    ours = ProjectionHead(24, 13, hidden=16, bottleneck=10).double()
    mlp = {key.removeprefix(f"{name}."): value for key, value in golden.items() if key.startswith(f"{name}.mlp")}
    ours.load_state_dict(mlp | {"prototypes": golden[f"{name}.last_layer.weight_v"]})
    return ours


def test_from_tokens_to_gradients_of_the_head() -> None:
    golden = tensors("flsl_end2end")
    tokens = golden["enc_s"].requires_grad_()
    query = queries(tokens, golden["mask"])
    modes = mean_shift(query, tokens, golden["sa_temp"].item())
    positives = mean_shift(query, golden["enc_t"], golden["ca_temp"].item()).detach()
    student, teacher = head(golden, "student_head"), head(golden, "teacher_head")
    logits_s, logits_t = student(modes), teacher(positives)
    assert_close(logits_s, golden["student_logits"], 1e-9)
    assert_close(logits_t, golden["teacher_logits"], 1e-9)
    temp_t = linear_warmup(int(golden["epoch"]), 0.04, 0.07, 30)
    terms = loss(*(x.flatten(0, 1) for x in (query, modes, logits_s, logits_t)), temp_t)
    for name, value in terms.items():
        assert_close(value, golden[name], 1e-9)
    terms["total"].backward()
    assert_close(tokens.grad, golden["grad_enc_s"], 1e-9)
    assert_close(student.mlp[0].weight.grad, golden["grad_head_mlp0"], 1e-9)
    assert_close(student.prototypes.grad, golden["grad_head_last_v"], 1e-9)


@pytest.mark.parametrize(
    ("key", "grid", "window", "corner"),
    [
        ("g14_w3_tl", 14, 3, 0),
        ("g14_w3_tr", 14, 3, 1),
        ("g14_w3_bl", 14, 3, 2),
        ("g14_w3_br", 14, 3, 3),
        ("l6_w2", 6, 2, 3),
    ],
)
def test_sampling_masks(key: str, grid: int, window: int, corner: int) -> None:
    cells = torch.zeros(1, (grid // window) ** 2, dtype=torch.long)
    index = window_queries(grid, window, cells, torch.tensor([corner]))
    mask = torch.zeros(grid * grid, dtype=torch.bool)
    mask[index[0]] = True
    assert torch.equal(mask.reshape(grid, grid), tensors("flsl_sampling_masks")[key])


def test_patches_of_the_largest_box() -> None:
    golden = load("flsl_bbox_patches")
    for row, expected in zip(golden["inputs"], golden["selected_box_and_patch_ids"], strict=True):
        boxes = row[3 : 3 + 4 * int(row[2])].reshape(-1, 4)
        found = object_patches(boxes, int(row[0]), int(row[1]), official_geometry=True)
        assert found is not None
        np.testing.assert_array_equal([found[0], *found[1]], expected)


@pytest.mark.parametrize("k", [10, 20, 140])
def test_bbox_knn(k: int) -> None:
    golden = tensors("flsl_bbox_knn")
    places = best_places(
        golden["train"].double(),
        golden["y_train"],
        golden["test"].double(),
        golden["y_test"],
        classes=int(golden["num_classes"]),
        k=k,
        temperature=golden["T"].item(),
    )
    assert accuracy(places, 1) == pytest.approx(golden[f"top1_k{k}"].item(), abs=1e-9)
    assert accuracy(places, 1) <= accuracy(places, 5) <= 100  # the released top-5 over-counts
