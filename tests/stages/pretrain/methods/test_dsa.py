"""DSA around every host: terms, gradients, what it sees of its host, its auxiliary encoder, resume, ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from stages.models.encoder import Encoder
from stages.models.settings import Backbone
from stages.pretrain.config.method import method_settings
from stages.pretrain.methods.dsa.method import DSA
from stages.pretrain.methods.dsa.settings import DSASettings
from stages.pretrain.methods.method import Step
from tests.stages.pretrain.methods.ranks import Results
from tests.stages.pretrain.methods.tiny import CROPS, HEAD
from tests.stages.pretrain.methods.tiny_hosts import (
    AUXILIARY,
    HOSTS,
    OURS,
    STEP,
    a_batch,
    assert_ranks_train_alike,
    build,
    settings,
    silent,
    train_on_rank,
    train_step,
)


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
    (first,) = (
        p for n, p in method.named_parameters() if n.endswith(".model.blocks.0.attn.qkv.weight") and p.requires_grad
    )
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
    train_step(method, batch, torch.optim.SGD(method.trained_parameters(), lr=0.05), Step(0, 10, 2))
    resumed = build(settings("moco_v2", dsa=True))
    resumed.load_state_dict(method.state_dict())
    first, second = method(batch), resumed(batch)
    assert all(torch.equal(first[term], second[term]) for term in first)


def test_rules_are_named() -> None:
    with pytest.raises(ValidationError, match="exactly one of the two"):
        method_settings({"name": "dsa", "host": HOSTS["simclr"]})
    with pytest.raises(ValidationError, match="cannot regularise itself"):
        method_settings(
            {"name": "dsa", "embeddings": "e", "host": {"name": "dsa", "host": HOSTS["simclr"]} | {"embeddings": "e"}}
        )
    with pytest.raises(ValidationError, match="no such term simclr; dsa has dsa_am, dsa_con"):
        method_settings({"name": "dsa", "embeddings": "e", "host": HOSTS["simclr"], "weights": {"simclr": 2.0}})


# ------------------------------------------------------------------------------------------------------------- ranks
RANKED = {
    "simclr": {},
    "mae": {},
    "byol": {"cached": True},
}


def _train(rank: int, world_size: int) -> Results:
    return train_on_rank(
        ((name, settings(name, dsa=True, **knobs)) for name, knobs in RANKED.items()), rank, world_size
    )


@pytest.mark.slow
def test_two_ranks_give_the_terms_and_gradients_of_one(tmp_path: Path) -> None:
    assert_ranks_train_alike(_train, tmp_path)
