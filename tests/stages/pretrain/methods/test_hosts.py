"""The methods that DSA regularises, and DSA around each of them: terms, gradients, resume, queues, ranks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from stages.models.encoder import Encoder
from stages.models.settings import Backbone
from stages.pretrain.config.method import MethodSettings, method_settings
from stages.pretrain.data.batch import Batch
from stages.pretrain.methods.dsa.method import DSA
from stages.pretrain.methods.dsa.settings import DSASettings
from stages.pretrain.methods.hosts.vicregl import cell_centres
from stages.pretrain.methods.method import Method, Step
from stages.pretrain.methods.shared.queue import Queue
from stages.pretrain.views.geometry import crop_affine
from tests.stages.pretrain.methods.ranks import Results, assert_alike, on_one_and_two, steps_of
from tests.stages.pretrain.methods.tiny import CROPS, HEAD, fake_batch, share, tiny_encoder

MLP = {"hidden": 16, "out": 12}
VIEWS = {"size": 32, "projector": MLP}
HOSTS: dict[str, dict[str, Any]] = {
    "simclr": {"name": "simclr", **VIEWS},
    "moco_v2": {"name": "moco", "queue": 20, **VIEWS},
    "moco_v3": {"name": "moco", "version": "v3", "predictor_hidden": 16, **VIEWS},
    "byol": {"name": "byol", "predictor_hidden": 16, **VIEWS},
    "simsiam": {"name": "simsiam", "predictor_hidden": 6, **VIEWS},
    "barlow_twins": {"name": "barlow_twins", **VIEWS},
    "vicreg": {"name": "vicreg", **VIEWS},
    "vicregl": {"name": "vicregl", **CROPS, "projector": MLP, "local_projector": MLP, "num_matches": (8, 4)},
    "swav": {"name": "swav", **CROPS, "projector": MLP, "prototypes": 10, "queue": 16, "queue_from_epoch": 0}
    | {"freeze_prototypes": 0},
    "ressl": {"name": "ressl", "queue": 20, **VIEWS},
    "mae": {"name": "mae", "size": 32, "mask_ratio": 0.7, "decoder": {"width": 16, "blocks": 1, "heads": 2}},
}
OURS: dict[str, dict[str, Any]] = {
    "dino": {"name": "dino", "head": HEAD, **CROPS},
    "dino_dense": {"name": "dino_dense", "head": HEAD, "dense_head": HEAD, **CROPS},
    "cotap": {"name": "cotap", "neighbors": "knn", "image_head": HEAD, "dense_head": HEAD, "dense": {"grid": 3}}
    | CROPS,
}
AUXILIARY = {
    "name": "vit_tiny_patch16_224",
    "patch_size": 8,
    "img_size": 24,
    "kwargs": {"embed_dim": 16, "depth": 1, "num_heads": 2},
    "mean": (0.5, 0.5, 0.5),
}
STEP = Step(index=3, total=10, steps_per_epoch=2)


def settings(name: str, *, dsa: bool = False, cached: bool = False, **knobs: Any) -> MethodSettings:
    host = {**HOSTS, **OURS}[name]
    if not dsa:
        return method_settings(host)
    source = {"embeddings": "clip"} if cached else {"auxiliary": AUXILIARY}
    return method_settings({"name": "dsa", "host": host, "eta": 3, "hidden": 14, **source, **knobs})


def build(config: MethodSettings, *, resnet: bool = False) -> Method:
    method = config.build(tiny_encoder(resnet=resnet), total_steps=10, steps_per_epoch=2, global_batch=8)
    for module in method.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0  # so that runs can be compared
    return method.train()


def a_batch() -> Batch:
    batch = fake_batch()
    batch.extras["embedding"] = torch.randn(8, 5, generator=torch.Generator().manual_seed(9))
    return batch


def train_step(method: Method, batch: Batch, optimizer: torch.optim.Optimizer, step: Step) -> dict[str, float]:
    method.start_step(step)
    terms = method(batch)
    sum(terms.values()).backward()
    method.before_update(step)
    optimizer.step()
    optimizer.zero_grad()
    method.after_step(step)
    return {name: term.item() for name, term in terms.items()}


def trained(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad


def silent(method: nn.Module) -> list[str]:
    """Trained parameters without a gradient. The bias before a softmax over rows shifts all its logits alike."""
    return [
        name
        for name, parameter in method.named_parameters()
        if parameter.requires_grad
        and (parameter.grad is None or not parameter.grad.abs().sum() > 0)
        and name != "arranger.output.bias"
    ]


# --------------------------------------------------------------------------------------------------------- the hosts
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
    optimizer = torch.optim.AdamW(method.parameter_groups(), lr=3e-3)
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
    optimizer = torch.optim.SGD(method.parameter_groups(), lr=0.05)
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
    assert byol.encoder() is byol.network.encoder
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
    optimizer = torch.optim.SGD(method.parameter_groups(), lr=0.5)
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
    with pytest.raises(ValueError, match="at least 2"):
        settings("simclr").build(tiny_encoder(), total_steps=1, steps_per_epoch=1, global_batch=1)
    with pytest.raises(ValidationError, match="exactly one of the two"):
        method_settings({"name": "dsa", "host": HOSTS["simclr"]})
    with pytest.raises(ValidationError, match="cannot regularise itself"):
        method_settings(
            {"name": "dsa", "embeddings": "e", "host": {"name": "dsa", "host": HOSTS["simclr"]} | {"embeddings": "e"}}
        )
    with pytest.raises(ValidationError, match="no such term simclr; dsa has dsa_am, dsa_con"):
        method_settings({"name": "dsa", "embeddings": "e", "host": HOSTS["simclr"], "weights": {"simclr": 2.0}})


# --------------------------------------------------------------------------------------------------------------- DSA
@pytest.mark.parametrize("name", [*HOSTS, *OURS])
def test_dsa_adds_two_terms_to_any_host(name: str) -> None:
    config = settings(name, dsa=True)
    assert isinstance(config, DSASettings)
    method, batch = build(config), a_batch()
    assert isinstance(method, DSA)
    method.start_step(STEP)
    torch.manual_seed(5)
    terms = method(batch)
    assert list(terms) == [*config.host.terms, "dsa_am", "dsa_con"]
    assert all(torch.isfinite(term) for term in terms.values())

    alone = build(config.host.as_host())
    alone.start_step(STEP)
    torch.manual_seed(5)
    for term, value in alone(batch).items():
        torch.testing.assert_close(terms[term], value)

    (terms["dsa_am"] + terms["dsa_con"]).backward(retain_graph=True)
    assert method.arranger.hidden.weight.grad.abs().sum() > 0
    (first,) = (p for n, p in method.named_parameters() if n.endswith(".model.blocks.0.attn.qkv.weight") and trained(p))
    assert first.grad.abs().sum() > 0  # they reach the host's encoder
    sum(terms.values()).backward()
    assert silent(method) == []
    assert all(not p.requires_grad and p.grad is None for p in method.auxiliary.encoder.parameters())
    assert not any("auxiliary" in key for key in method.state_dict())
    assert 0 <= method.diagnostics()["dsa_score"] <= 1


def test_dsa_sees_the_hosts_own_representations_of_both_views() -> None:
    method, batch = build(settings("simclr", dsa=True)), a_batch()
    with method.views:
        method.host.compute_terms(batch)
        z, images = method.views.two(batch)
    assert torch.equal(images, batch.views["global"].flatten(0, 1))
    torch.testing.assert_close(z, method.host.network.encoder(images).vector)
    assert method.views.heard == []
    ressl = build(settings("ressl", dsa=True))  # its student never sees the weak view: DSA shows it
    with ressl.views:
        ressl.host.compute_terms(batch)
        z, images = ressl.views.two(batch)
    assert torch.equal(images, batch.views["global"].flatten(0, 1))
    torch.testing.assert_close(z, ressl.host.network.encoder(images).vector)


def test_a_host_whose_student_sees_one_view_needs_another_of_its_size() -> None:
    host = {**OURS["dino"], "global_crops": {"size": 32, "count": 1, "scale": (0.25, 1.0)}}
    method = build(method_settings({"name": "dsa", "host": host, "auxiliary": AUXILIARY}))
    batch = a_batch()
    batch.views["global"] = batch.views["global"][:1]
    with pytest.raises(ValueError, match=r"its host makes one of 32 pixels.*global_crops\.count: 2"):
        method(batch)
    method.views.names = ["teacher", "global"]  # as FLSL: the teacher's crop has the student's size
    batch.views["teacher"] = batch.views["global"] + 1
    assert torch.isfinite(method(batch)["dsa_am"])


def test_flsl_is_a_host_too() -> None:
    kwargs = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    fields = {"name": "vit_tiny_patch16_224", "patch_size": 4, "img_size": 32, "kwargs": kwargs}
    encoder = Encoder.build(Backbone(class_token=False, pos_embed="sincos", **fields))
    crops = {"global_crops": {"size": 32, "count": 1, "scale": (0.5, 1)}, "teacher_crop": {"size": 32}}
    host = {"name": "flsl", "head": HEAD, "local_crops": CROPS["local_crops"], **crops}
    config = method_settings({"name": "dsa", "host": host, "auxiliary": AUXILIARY})
    method = config.build(encoder, total_steps=10, steps_per_epoch=2, global_batch=8)
    batch = a_batch()
    batch.views["teacher"], batch.views["global"] = batch.views["global"][:1], batch.views["global"][1:]
    batch.affines["teacher"], batch.affines["global"] = batch.affines["global"][:1], batch.affines["global"][1:]
    method.start_step(STEP)
    terms = method(batch)
    assert list(terms) == ["intra", "inter", "vmr", "dsa_am", "dsa_con"]
    assert all(torch.isfinite(term) for term in terms.values())
    assert config.term_weights()["vmr"] == 5.0


def test_inputs_of_the_host_reach_it() -> None:
    method = build(settings("dino", dsa=True))
    seen: list[dict[str, Any]] = []
    method.host.use_inputs = lambda inputs: seen.append(dict(inputs))
    method.use_inputs({"embeddings": 1, "host.neighbors": 2})
    assert seen == [{"neighbors": 2}]


def test_cached_embeddings_serve_both_views() -> None:
    config = settings("simclr", dsa=True, cached=True)
    method, batch = build(config), a_batch()
    assert "embeddings" in method.view_plan().tables
    assert method.auxiliary is None
    features = method._auxiliary_features(batch, batch.views["global"])
    assert torch.equal(features[:8], features[8:])
    torch.testing.assert_close(features.norm(dim=1), torch.ones(16))
    assert torch.isfinite(method(batch)["dsa_con"])
    assert "embeddings" not in build(settings("simclr", dsa=True)).view_plan().tables


def test_the_auxiliary_encoder_sees_its_own_normalisation_and_size() -> None:
    method = build(settings("simclr", dsa=True))
    seen = []
    method.auxiliary.encoder.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    mean, std = torch.tensor(method.encoder().mean), torch.tensor(method.encoder().std)
    grey = ((torch.full((1, 3, 32, 32), 0.75) - mean[:, None, None]) / std[:, None, None]).clone()
    method.auxiliary(grey)
    assert seen[0].shape == (1, 3, 24, 24)
    expected = (0.75 - torch.tensor([0.5, 0.5, 0.5])) / torch.tensor(method.auxiliary.encoder.std)
    torch.testing.assert_close(seen[0].mean(dim=(0, 2, 3)), expected)
    assert method.double().auxiliary.encoder.model.norm.weight.dtype == torch.float64


def test_weights_default_to_the_papers_and_the_hosts_stay_with_the_host() -> None:
    config = settings("vicregl", dsa=True)
    assert config.term_weights() == {"global": 0.75, "local": 0.25, "dsa_am": 0.1, "dsa_con": 100.0}
    changed = settings("vicregl", dsa=True, weights={"dsa_con": 1.0})
    assert changed.term_weights()["dsa_am"] == 0.1
    assert changed.term_weights()["dsa_con"] == 1.0
    again = method_settings(changed.model_dump(mode="json"))
    assert again == changed


@pytest.mark.parametrize(
    "knobs",
    [
        {"activation": "relu"},
        {"activation": "softplus", "m_scale": "row_max"},
        {"distance": "squared", "normalise": False},
        {"anchors": "latent"},
        {"anchors": "alike", "eta": 50},
    ],
)
def test_every_choice_gives_other_finite_terms(knobs: dict[str, Any]) -> None:
    def terms(**chosen: Any) -> torch.Tensor:
        found = build(settings("simclr", dsa=True, **chosen))(a_batch())
        return torch.stack([found["dsa_am"], found["dsa_con"]])

    assert torch.isfinite(terms(**knobs)).all()
    assert not torch.equal(terms(**knobs), terms())


def test_dsa_resumes_exactly() -> None:
    method, batch = build(settings("moco_v2", dsa=True)), a_batch()
    train_step(method, batch, torch.optim.SGD(method.parameter_groups(), lr=0.05), Step(0, 10, 2))
    resumed = build(settings("moco_v2", dsa=True))
    resumed.load_state_dict(method.state_dict())
    first, second = method(batch), resumed(batch)
    assert all(torch.equal(first[term], second[term]) for term in first)


# ------------------------------------------------------------------------------------------------------------- ranks
SHARED = [*HOSTS, "dsa:simclr", "dsa:mae", "dsa:cached"]


def _shared(name: str) -> MethodSettings:
    if name == "dsa:cached":
        return settings("byol", dsa=True, cached=True)
    return settings(name.removeprefix("dsa:"), dsa=name.startswith("dsa:"))


def _train(rank: int, world_size: int) -> Results:
    results: Results = {}
    for name in SHARED:
        method = build(_shared(name), resnet=name == "byol").double()
        batch = share(a_batch(), rank, world_size)
        for tensors in (batch.views, batch.affines, batch.extras):
            tensors.update({key: value.double() for key, value in tensors.items()})
        results[name] = list(steps_of(method, [batch] * 3, world_size, lr=0.05))
    return results


@pytest.mark.slow
def test_two_ranks_give_the_terms_and_gradients_of_one(tmp_path: Path) -> None:
    one, two = on_one_and_two(_train, tmp_path)
    for name, index, rank in itertools.product(SHARED, range(3), range(2)):
        mine, theirs = two[rank][name][index], one[name][index]
        assert_alike(f"{name}, step {index}", mine, theirs, terms=(1e-5, 1e-8), gradients=(1e-4, 1e-5))
