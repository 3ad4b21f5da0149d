"""DSA around every host: terms, gradients, what it sees of its host, its auxiliary encoder, resume, ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pipeline.errors import UsageError
from stages.models.encoder import Encoder
from stages.models.settings import Backbone
from stages.pretrain.config.method import method_settings
from stages.pretrain.methods.dsa.method import DSA
from stages.pretrain.methods.dsa.released import Concatenations, Differences, ReleasedDSA
from stages.pretrain.methods.dsa.settings import DSASettings
from stages.pretrain.methods.method import Step
from tests.stages.pretrain.methods.ranks import Results
from tests.stages.pretrain.methods.tiny import CROPS, HEAD, train_step
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
    with pytest.raises(UsageError, match=r"its host makes one of 32 pixels.*global_crops\.count: 2"):
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


def test_a_host_that_makes_no_vectors_of_views_is_refused_before_the_first_step() -> None:
    config = method_settings({"name": "dsa", "host": {"name": "d3ssl", "boxes": "boxes"}, "auxiliary": AUXILIARY})
    with pytest.raises(UsageError, match=r"d3ssl on a ResNet .* dsa has nothing to compare: choose a ViT"):
        build(config, resnet=True)


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


# ---------------------------------------------------------------------------------------------------- as released
@pytest.mark.parametrize("name", ["simclr", "moco_v2", "moco_v3", "byol", "simsiam", "vicreg", "ressl"])
@pytest.mark.parametrize("knobs", [{}, {"cached": True}, {"released": {"pairs": "concatenation"}}], ids=str)
def test_the_released_variant_adds_terms_of_its_own_names(name: str, knobs: dict[str, Any]) -> None:
    config = settings(name, dsa=True, variant="released", **knobs)
    method, batch = build(config), a_batch()
    assert isinstance(method, ReleasedDSA)
    method.start_step(STEP)
    terms = method(batch)
    assert list(terms) == [*config.host.terms, "dsa_released_arrange", "dsa_released_constraint"]
    assert list(config.term_weights().values())[-2:] == [1.0, 0.01]  # lambda1, and lambda2 of a mean
    (terms["dsa_released_arrange"] + terms["dsa_released_constraint"]).backward(retain_graph=True)
    encoder = method.encoder().model.blocks[0].attn.qkv.weight
    assert encoder.grad.abs().sum() > 0
    assert method.arranger.hidden.weight.grad.abs().sum() > 0
    assert 0 <= method.diagnostics()["dsa_score"] <= 1


def test_the_released_variant_compares_projections_and_whole_images() -> None:
    method, batch = build(settings("simclr", dsa=True, variant="released")), a_batch()
    with method.views:
        method.host.compute_terms(batch)
        z, images = method.views.two(batch)
    assert torch.equal(images, batch.views["global"].flatten(0, 1))
    torch.testing.assert_close(z, method.host.network(images))
    (whole,) = [spec for spec in method.view_plan().views if spec.whole]
    assert (whole.name, whole.size, whole.flip_p) == ("original", 24, 0.0)
    method(batch)
    before = method.diagnostics()
    batch.views["original"] = torch.randn(1, 8, 3, 24, 24, generator=torch.Generator().manual_seed(2))
    method(batch)
    after = method.diagnostics()
    assert after["dsa_m_max"] == before["dsa_m_max"]
    assert after["dsa_score"] != before["dsa_score"]  # the anchors' scores are those of the whole images


@pytest.mark.parametrize("network", [Differences, Concatenations])
def test_a_released_network_starts_alive(network: type[Differences | Concatenations]) -> None:
    """It ends in a ReLU: one that starts at 0 for all pairs would never learn."""
    for seed in range(20):
        torch.manual_seed(seed)
        z = 0.1 * torch.randn(6, 12)
        assert network(12)(z, z).sum() > 0


def test_the_released_variant_needs_another_image() -> None:
    assert settings("moco_v2", dsa=True).least_batch() == 1
    assert settings("moco_v2", dsa=True, variant="released").least_batch() == 2  # whose neighbours give the scores
    assert settings("simclr", dsa=True).least_batch() == 2  # the host's


def test_the_variants_cannot_be_mixed_up() -> None:
    both = [settings("simclr", dsa=True, cached=True), settings("simclr", dsa=True, cached=True, variant="released")]
    assert not set(both[0].weights) & set(both[1].weights)
    assert [method_settings(each.model_dump(mode="json")) for each in both] == both
    for wrong, words in [
        ({"variant": "released", "alpha": 0.5, "hidden": 8}, "alpha, hidden: of variant text"),
        ({"released": {"mu": 2}}, "set variant: released"),
        ({"variant": "released", "weights": {"dsa_am": 1.0}}, "no such term dsa_am; dsa has dsa_released_arrange"),
        ({"weights": {"dsa_released_arrange": 1.0}}, "no such term dsa_released_arrange; dsa has dsa_am"),
    ]:
        with pytest.raises(ValidationError, match=words):
            method_settings({"name": "dsa", "host": HOSTS["simclr"], "embeddings": "e", **wrong})
    with pytest.raises(ValidationError, match="projections of two views, of which dino has none"):
        method_settings({"name": "dsa", "variant": "released", "host": OURS["dino"], "embeddings": "e"})


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
    with pytest.raises(ValidationError, match=r"host\n.*vice trains a backbone's levels"):
        method_settings({"name": "dsa", "embeddings": "e", "host": {"name": "vice", "superpixels": "s"}})


# ------------------------------------------------------------------------------------------------------------- ranks
RANKED = {
    "simclr": {},
    "barlow_twins": {"variant": "released"},
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
