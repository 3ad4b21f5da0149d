"""dino, dino_dense and cotap on a tiny ViT: terms, gradients, the teacher, resume, and ranks."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from stages.models.encoder import Encoder
from stages.pretrain.data.batch import Batch
from stages.pretrain.methods.cotap.settings import CoTAPSettings
from stages.pretrain.methods.dino.settings import DinoSettings
from stages.pretrain.methods.dino_dense.settings import DinoDenseSettings
from stages.pretrain.methods.method import Method, Step
from stages.pretrain.methods.shared.overlap import resample, views_of
from stages.pretrain.views.geometry import overlap
from tests.stages.pretrain.methods.ranks import Results, assert_alike, on_one_and_two, steps_of
from tests.stages.pretrain.methods.tiny import CROPS, HEAD, fake_batch, share, tiny_encoder, train_step

STEP = Step(index=3, total=10, steps_per_epoch=2)
COTAP = {"neighbors": "knn", "image_head": HEAD, "dense_head": HEAD, "dense": {"grid": 3}, **CROPS}
SETTINGS: dict[str, Any] = {
    "dino": DinoSettings(head=HEAD, **CROPS),
    "dino_sinkhorn": DinoSettings(head=HEAD, centering="sinkhorn", **CROPS),
    "dino_dense": DinoDenseSettings(head=HEAD, dense_head=HEAD, **CROPS),
    "cotap": CoTAPSettings(**COTAP),
    "cotap_same_view": CoTAPSettings(**COTAP, ranking={"pairs": "same_view", "feature": "backbone"}),
    "cotap_pre_last": CoTAPSettings(**COTAP, filter={"placement": "pre_last", "heads": 1}),
    "cotap_literal": CoTAPSettings(**COTAP, literal_feature_softmax=True, ranking={"similarity_range": "cosine"}),
    "cotap_bce": CoTAPSettings(**COTAP, ranking={"loss": "bce"}, flip=0.5),
    "cotap_unfiltered": CoTAPSettings(**COTAP, filter=None),
}


def build(name: str, *, resnet: bool = False) -> Method:
    settings = SETTINGS[name]
    method = settings.build(tiny_encoder(resnet=resnet), total_steps=10, steps_per_epoch=2, global_batch=8)
    for module in method.student.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0  # so that runs can be compared
    return method.train()


@pytest.mark.parametrize("name", SETTINGS)
def test_terms_are_finite_and_every_student_parameter_learns(name: str) -> None:
    method = build(name)
    method.start_step(STEP)
    terms = method(fake_batch(flips=SETTINGS[name].flip > 0))
    expected = set(SETTINGS[name].terms) - ({"proto"} if name == "cotap_unfiltered" else set())
    assert set(terms) == expected
    assert all(term.ndim == 0 and torch.isfinite(term) for term in terms.values()), terms
    sum(terms.values()).backward()
    silent = [
        parameter_name
        for parameter_name, parameter in method.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.abs().sum() > 0)
    ]
    assert silent == []
    assert all(not parameter.requires_grad for parameter in method.teacher.parameters())
    assert all(math.isfinite(value) for value in method.diagnostics().values())


@pytest.mark.parametrize("name", ["dino", "dino_dense", "cotap"])
def test_a_resnet_works_too(name: str) -> None:
    method = build(name, resnet=True)
    terms = method(fake_batch())
    assert all(torch.isfinite(term) for term in terms.values())
    sum(terms.values()).backward()
    assert next(method.student.encoder.model.parameters()).grad.abs().sum() > 0  # the first convolution


@pytest.mark.parametrize("name", ["dino_dense", "cotap"])
def test_training_lowers_the_loss_and_the_teacher_follows(name: str) -> None:
    method, batch = build(name), fake_batch()
    optimizer = torch.optim.AdamW(method.trained_parameters(), lr=2e-3)
    before = {key: value.clone() for key, value in method.teacher.state_dict().items()}
    totals = [sum(train_step(method, batch, optimizer, Step(i, 1000, 1)).values()) for i in range(1, 13)]
    # Not from the first step on: there the teacher is the student itself, and its centre is still zero.
    assert sum(totals[-3:]) < 0.9 * sum(totals[1:4]), totals
    key = "encoder.model.blocks.0.attn.qkv.weight"
    student, teacher = method.student.state_dict()[key], method.teacher.state_dict()[key]
    assert 0 < (teacher - before[key]).norm() < (student - before[key]).norm()


@pytest.mark.parametrize(("name", "default"), [("dino", "teacher"), ("dino_dense", "teacher"), ("cotap", "student")])
def test_the_branch_that_is_exported(name: str, default: str) -> None:
    for export in (None, "student", "teacher"):
        settings = SETTINGS[name].model_copy(update={"export": export} if export else {})
        method = settings.build(tiny_encoder(), total_steps=10, steps_per_epoch=2, global_batch=8)
        assert method.encoder() is getattr(method, export or default).encoder


def test_teacher_moves_by_the_scheduled_momentum() -> None:
    method = build("cotap")
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter.add_(1.0)
        method.student.head("dense").renormalise()
        method.student.head("image").renormalise()
    old, new = list(method.teacher.state_dict().values()), list(method.student.state_dict().values())
    expected = [0.9997 * a + 0.0003 * b for a, b in zip(old, new, strict=True)]
    method.after_step(Step(0, 10, 5))
    for value, want in zip(method.teacher.state_dict().values(), expected, strict=True):
        torch.testing.assert_close(value, want)


def test_first_epoch_leaves_the_prototypes_alone() -> None:
    method, batch = build("dino"), fake_batch()
    prototypes = method.student.head("image").prototypes
    optimizer = torch.optim.SGD(method.trained_parameters(), lr=0.1)
    before = prototypes.detach().clone()
    train_step(method, batch, optimizer, Step(1, 10, 2))
    torch.testing.assert_close(prototypes.detach(), before)
    train_step(method, batch, optimizer, Step(2, 10, 2))
    assert (prototypes.detach() - before).norm() > 1e-4


def test_centre_moves_after_the_step_and_survives_a_resume() -> None:
    batch, method = fake_batch(), build("dino")
    optimizer = torch.optim.SGD(method.trained_parameters(), lr=0.1)
    train_step(method, batch, optimizer, STEP)
    assert method.center.abs().sum() > 0
    resumed = build("dino")
    resumed.load_state_dict(method.state_dict())
    for each in (method, resumed):
        each.start_step(STEP)
    assert torch.equal(method(batch)["align_image"], resumed(batch)["align_image"])


@pytest.mark.parametrize("name", ["dino_dense", "cotap"])
def test_state_round_trips(name: str) -> None:
    method, batch = build(name), fake_batch()
    train_step(method, batch, torch.optim.SGD(method.trained_parameters(), lr=0.1), STEP)
    resumed = build(name)
    assert set(resumed.state_dict()) == set(method.state_dict())
    resumed.load_state_dict(method.state_dict())
    resumed.start_step(STEP)
    first, second = method(batch), resumed(batch)
    assert all(torch.equal(first[term], second[term]) for term in first)


def test_image_level_terms_see_object_centric_images_only() -> None:
    def terms(batch: Batch, roles: tuple[str, ...] | None) -> dict[str, torch.Tensor]:
        method = build("cotap")
        if roles:
            method.use_sources(roles)
        return {name: term.detach() for name, term in method(batch).items()}

    batch, changed = fake_batch(), fake_batch()
    scenes = batch.source == 1
    for name in ("global", "local", "neighbor"):
        changed.views[name] = torch.where(scenes[None, :, None, None, None], 0.5, changed.views[name])
    mixed, mixed_changed = terms(batch, ("objects", "scenes")), terms(changed, ("objects", "scenes"))
    for name in ("align_image", "sc_image", "proto"):
        torch.testing.assert_close(mixed[name], mixed_changed[name])
        assert not torch.allclose(mixed[name], terms(batch, None)[name])
    assert not torch.allclose(mixed["align_patch"], mixed_changed["align_patch"])
    only_scenes = terms(batch, ("scenes", "scenes"))
    assert only_scenes["align_image"] == only_scenes["sc_image"] == only_scenes["proto"] == 0


def test_images_without_neighbours_are_left_out() -> None:
    method, batch = build("cotap"), fake_batch()
    batch.neighbor_ids = torch.full_like(batch.image_ids, -1)
    batch.views["neighbor"] = batch.views["neighbor"][:, :0]
    assert method(batch)["sc_image"] == 0


def test_terms_without_weight_are_not_computed() -> None:
    settings = CoTAPSettings(
        weights={"sc_image": 0, "align_image": 0, "align_patch": 0, "proto": 0}, dense_head=HEAD, **CROPS
    )
    method = settings.build(tiny_encoder(), total_steps=10, steps_per_epoch=2, global_batch=8)
    assert set(method(fake_batch(neighbors=False))) == {"sc_patch"}
    assert set(method.student.heads) == {"dense"}
    assert [view.name for view in method.view_plan().views] == ["global"]
    assert method.view_plan().tables == ()


def test_settings_say_what_is_missing() -> None:
    with pytest.raises(ValidationError, match="neighbors: the term sc_image needs"):
        CoTAPSettings()
    with pytest.raises(ValidationError, match="no such term sc_pach"):
        CoTAPSettings(neighbors="knn", weights={"sc_pach": 1.0})
    with pytest.raises(ValidationError, match="at least 2"):
        CoTAPSettings(neighbors="knn", global_crops={"size": 32, "count": 1, "scale": (0.2, 1)})
    with pytest.raises(ValueError, match="pre_last needs a ViT"):
        CoTAPSettings(**COTAP, filter={"placement": "pre_last"}).build(
            tiny_encoder(resnet=True), total_steps=1, steps_per_epoch=1, global_batch=8
        )


def test_view_plan_asks_for_what_the_terms_need() -> None:
    plan = build("cotap").view_plan()
    views = {view.name: view for view in plan.views}
    assert plan.tables == ("neighbors",)
    assert views["neighbor"].of == "neighbor"
    assert (views["global"].min_overlap, views["local"].min_overlap) == (0.02, 0.01)
    assert all(view.flip_p == 0 for view in plan.views)
    dino = {view.name: view for view in build("dino").view_plan().views}
    assert isinstance(dino["global"].photometric, tuple)
    assert len(dino["global"].photometric) == 2
    assert dino["global"].overlap_with is None


def test_mirroring_a_view_moves_no_cell() -> None:
    """Maps of image coordinates: cells of two views' overlap show the same places, mirrored or not."""

    def regions(batch: Batch) -> list[torch.Tensor]:
        a, b = views_of(batch)[:2]
        box_a, box_b, valid = overlap(a.affine, b.affine, a.size, b.size)
        assert valid.all()
        return [
            resample(coordinates(view.affine), box, view, 3, may_flip=True) for view, box in ((a, box_a), (b, box_b))
        ]

    def coordinates(affine: torch.Tensor) -> torch.Tensor:
        centre = (torch.arange(8) + 0.5) * 4
        x = affine[:, 0, 0, None] * centre + affine[:, 0, 2, None]
        y = affine[:, 1, 1, None] * centre + affine[:, 1, 2, None]
        return torch.stack([x[:, None].expand(-1, 8, -1), y[:, :, None].expand(-1, -1, 8)], dim=1)

    batch, mirrored = fake_batch(), fake_batch()
    affine = mirrored.affines["global"][1]
    affine[:, 0, 2] += affine[:, 0, 0] * 32
    affine[:, 0, 0] *= -1
    assert (affine[:, 0, 0] < 0).all()
    # The middle column and row: no sample there meets the half-pixel clamp of a map's border.
    middle = [region[..., 1, 1] for region in (*regions(batch), *regions(mirrored))]
    left = [region[:, 0, 1, 0] - region[:, 0, 1, 1] for region in (*regions(batch), *regions(mirrored))]
    for region in middle[1:]:
        torch.testing.assert_close(region, middle[0], atol=1e-3, rtol=0)
    assert all((difference < 0).all() for difference in left)  # left is left in all of them


# ------------------------------------------------------------------------------------------------------------ ranks
NAMES = ["dino", "dino_sinkhorn", "dino_dense", "cotap"]


def _train(rank: int, world_size: int) -> Results:
    results: Results = {}
    for name in NAMES:
        method = build(name).double()  # rounding must not reorder similarities: psi counts are discontinuous
        if name == "cotap":
            method.use_sources(("objects", "scenes"))
        batch = share(fake_batch().to("cpu"), rank, world_size)
        for tensors in (batch.views, batch.affines):
            tensors.update({key: value.double() for key, value in tensors.items()})
        # An uneven split of the object-centric images between the ranks.
        batch.source = (batch.image_ids >= 5).long()
        results[name] = list(steps_of(method, [batch] * 2, world_size, lr=0.1))
    return results


@pytest.mark.slow
def test_two_ranks_give_the_terms_and_gradients_of_one(tmp_path: Path) -> None:
    one, two = on_one_and_two(_train, tmp_path)
    for name, rank in itertools.product(NAMES, range(2)):
        first, second = zip(two[rank][name], one[name], strict=True)
        assert_alike(name, *first, terms=(1e-7, 1e-8), gradients=(1e-7, 1e-6))
        # timm resizes position tables in float32: after an update, psi's counts may differ for a pair of patches.
        assert_alike(name, *second, terms=(1e-3, 1e-8), gradients=(1e-3, 1e-3))


def test_the_exported_encoder_keeps_its_filter(tmp_path: Path) -> None:
    method = build("cotap")
    encoder = method.encoder().eval()
    encoder.save(tmp_path, method="cotap")
    loaded = Encoder.load(tmp_path).eval()
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(loaded(image).map, encoder(image).map)
    assert loaded.width == 2 * loaded.backbone_width
    # A second run that starts from it keeps the filter, and says so if another one is asked for.
    again = SETTINGS["cotap"].build(loaded, total_steps=1, steps_per_epoch=1, global_batch=8)
    assert torch.isfinite(again(fake_batch())["proto"])
    with pytest.raises(ValueError, match=r"method\.filter asks for"):
        SETTINGS["cotap_pre_last"].build(loaded, total_steps=1, steps_per_epoch=1, global_batch=8)
