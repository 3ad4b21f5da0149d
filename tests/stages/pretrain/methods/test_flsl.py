"""flsl on tiny encoders: terms against a slow loop, gradients, sampling, views, the multi-stage form, resume, ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.stage import edges
from pipeline.store.artifact import Artifact
from stages.models.encoder import Encoder
from stages.models.settings import Backbone
from stages.pretrain.config.method import method_settings
from stages.pretrain.config.pretrain import PretrainConfig
from stages.pretrain.data.batch import Batch
from stages.pretrain.launch.assemble import assemble
from stages.pretrain.methods.flsl.method import FLSL, HEAD
from stages.pretrain.methods.flsl.query_sampling import sample_queries
from stages.pretrain.methods.flsl.settings import FLSLSettings
from stages.pretrain.methods.method import Step
from stages.pretrain.views.draw import draw_colour, draw_views, generator, shown
from tests.stages.pretrain.conftest import SMALL, RunStage
from tests.stages.pretrain.methods.ranks import Results, assert_alike, on_one_and_two, steps_of
from tests.stages.pretrain.methods.tiny import share, tiny_encoder, train_step

STEP = Step(index=3, total=10, steps_per_epoch=2)
TINY: dict[str, Any] = {
    "teacher_crop": {"size": 32},
    "global_crops": {"size": 32, "count": 1, "scale": (0.5, 1.0)},
    "local_crops": {"size": 16, "count": 2, "scale": (0.1, 0.4)},
    "head": {"prototypes": 12, "hidden": 24, "bottleneck": 16},
}
PAPER = {key: value for key, value in TINY.items() if key != "local_crops"} | {"two_teacher_views": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": TINY,
    "paper": PAPER,
    "code_queries": TINY | {"queries": {"window_global": 3, "window_local": 3, "random": False}},
    "centre": TINY | {"centering": "centre"},
    "sinkhorn": TINY | {"centering": "sinkhorn", "weights": {"vmr": 1}},
    "scheduled": TINY | {"self_attention": {"start": 0.3, "end": 0.1}},
}


def flsl_encoder(seed: int = 0, **changes: Any) -> Encoder:
    torch.manual_seed(seed)
    fields = {"class_token": False, "pos_embed": "sincos", "pos_interp": "scale_factor_plus_0.1", "drop_path": 0.1}
    kwargs = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    fields |= {"name": "vit_tiny_patch16_224", "patch_size": 4, "img_size": 32, "kwargs": kwargs}
    return Encoder.build(Backbone.model_validate(fields | changes))


def build(config: dict[str, Any], encoder: Encoder | None = None) -> FLSL:
    settings = FLSLSettings.model_validate(config)
    method = settings.build(encoder or flsl_encoder(), total_steps=10, steps_per_epoch=2, global_batch=8)
    assert isinstance(method, FLSL)
    for module in method.student.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0  # so that runs can be compared
    return method.train()


def noise(config: dict[str, Any], count: int = 8, seed: int = 0) -> Batch:
    """Noise in every view of the plan: these terms hang on pixels alone."""
    rng = torch.Generator().manual_seed(seed)
    plan = build(config).view_plan()
    views = {s.name: torch.randn(s.count, count, 3, s.size, s.size, generator=rng) for s in plan.views}
    ids = torch.arange(count)
    return Batch(ids, torch.zeros_like(ids), views, {}, neighbor_ids=-torch.ones_like(ids), seed=7)


# ------------------------------------------------------------------------------------------------------------ terms
@pytest.mark.parametrize("name", VARIANTS)
def test_terms_are_finite_and_every_student_parameter_learns(name: str) -> None:
    method = build(VARIANTS[name])
    method.start_step(STEP)
    terms = method(noise(VARIANTS[name]))
    assert list(terms) == ["intra", "inter", "vmr"]
    assert all(term.ndim == 0 and torch.isfinite(term) for term in terms.values()), terms
    torch.stack(list(terms.values())).sum().backward()
    trained = {key: parameter for key, parameter in method.named_parameters() if parameter.requires_grad}
    silent = [key for key, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []
    assert "student.encoder.model.pos_embed" not in trained  # the table is fixed
    assert all(not p.requires_grad and p.grad is None for p in method.teacher.parameters())
    assert all(math.isfinite(value) for value in method.diagnostics().values())


def kl_to_uniform(mean_K: Tensor) -> Tensor:
    return sum(p * (p.log() + math.log(len(mean_K))) for p in mean_K)  # type: ignore[return-value]


def terms_one_by_one(method: FLSL, batch: Batch) -> dict[str, Tensor]:
    """The equations of docs/methods.md#flsl-terms, a query at a time."""
    settings, tokens_of = method.settings, lambda encoder, view: encoder(view).tokens_BND
    t_sa, t_ca = 0.1 / 24**0.5, 0.2 / 24**0.5
    crops = [view for name in ("global", "local") for view in batch.views.get(name, [])]
    student = [tokens_of(method.student.encoder, view) for view in crops]
    teacher = [tokens_of(method.teacher.encoder, batch.views[n][0]) for n in batch.views if n.startswith("teacher")]
    grids = [round(tokens.shape[1] ** 0.5) for tokens in student]
    index = sample_queries(batch, [(grid, 2) for grid in grids], random=True)
    intra, inter, shares = [], [], [[] for _ in teacher]
    for v, tokens_BND in enumerate(student):
        own = v if len(teacher) == 2 else 0
        for b, chosen_Q in enumerate(index[v]):
            z_ND, positive_ND = tokens_BND[b], teacher[(own + 1) % len(teacher)][b]
            for query in z_ND[chosen_Q]:
                mode = torch.softmax(t_sa * z_ND @ query, 0) @ z_ND
                positive = torch.softmax(t_ca * positive_ND @ query, 0) @ positive_ND
                intra.append((query / query.norm() - mode / mode.norm()).square().sum())
                p_s = torch.softmax(method.student.head(HEAD)(mode) / settings.student_temperature, -1)
                p_t = torch.softmax(method.teacher.head(HEAD)(positive) / method.temperature, -1)
                inter.append(-(p_t.detach() * p_s.log()).sum())
                shares[own].append(p_s)
    means = [torch.stack(rows).mean(0) for rows in shares]
    return {
        "intra": torch.stack(intra).mean(),
        "inter": torch.stack(inter).mean(),
        "vmr": torch.stack([kl_to_uniform(mean_K) for mean_K in means]).mean(),
    }


@pytest.mark.parametrize("name", ["default", "paper"])
def test_terms_and_gradients_equal_a_loop_over_queries(name: str) -> None:
    batch = noise(VARIANTS[name], count=3)
    method = build(VARIANTS[name]).double()
    batch.views = {key: view.double() for key, view in batch.views.items()}
    method.start_step(STEP)
    parameters = list(method.trained_parameters())
    # The teacher differs from the student, as after some steps.
    with torch.no_grad():
        for parameter in method.teacher.parameters():
            parameter.mul_(1.1)
    fast, slow = method(batch), terms_one_by_one(method, batch)
    for term, value in slow.items():
        torch.testing.assert_close(fast[term], value, rtol=1e-9, atol=1e-12, msg=lambda m, term=term: f"{term}: {m}")
        grads = [torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True) for x in (fast[term], value)]
        for mine, wanted in zip(*grads, strict=True):
            assert (mine is None) == (wanted is None)
            if mine is not None:
                torch.testing.assert_close(mine, wanted, rtol=1e-7, atol=1e-10)


def test_weights_are_the_papers_unless_told_otherwise() -> None:
    assert FLSLSettings().term_weights() == {"intra": 0.03, "inter": 1.0, "vmr": 5.0}
    assert FLSLSettings(weights={"intra": 0.0}).term_weights() == {"intra": 0.0, "inter": 1.0, "vmr": 5.0}
    assert FLSLSettings().model_dump()["weights"] == {"intra": 0.03, "inter": 1.0, "vmr": 5.0}  # and fingerprinted
    ablation = TINY | {"weights": {"intra": 0}}
    assert list(build(ablation)(noise(ablation))) == ["inter", "vmr"]


def test_temperatures_scale_with_the_width_and_follow_their_schedules() -> None:
    method = build(VARIANTS["scheduled"])
    scales = []
    for index in (0, 5, 9):
        method.start_step(Step(index, 10, 2))
        scales.append(method.self_scale)
        assert method.cross_scale == 0.2
    assert scales[0] == pytest.approx(0.3)
    assert scales[0] > scales[1] > scales[2] > 0.1
    assert method._over_root(0.1, 24) == pytest.approx(0.1 / 24**0.5)
    assert build(TINY | {"temperature_width": 384})._over_root(0.1, 24) == pytest.approx(0.0051, abs=1e-5)
    method.start_step(Step(29 * 2, 1000, 2))
    assert method.temperature == pytest.approx(0.07)


def test_training_lowers_the_loss_and_the_teacher_follows() -> None:
    method, batch = build(TINY), noise(TINY)
    optimizer = torch.optim.AdamW(method.trained_parameters(), lr=2e-3)
    prototypes = method.student.head(HEAD).prototypes.detach().clone()
    teacher = {key: value.clone() for key, value in method.teacher.state_dict().items()}
    train_step(method, batch, optimizer, Step(0, 1000, 1))
    torch.testing.assert_close(method.student.head(HEAD).prototypes.detach(), prototypes)  # the first epoch's rule
    totals = [sum(train_step(method, batch, optimizer, Step(i, 1000, 1)).values()) for i in range(1, 16)]
    assert sum(totals[-3:]) < 0.9 * sum(totals[3:6]), totals  # the first steps' peak says nothing
    key = "encoder.model.blocks.0.attn.qkv.weight"
    moved = [(branch.state_dict()[key] - teacher[key]).norm() for branch in (method.teacher, method.student)]
    assert 0 < moved[0] < moved[1]
    assert method.encoder() is method.teacher.encoder


@pytest.mark.parametrize("name", ["default", "centre"])
def test_a_resumed_run_continues_as_it_was(name: str) -> None:
    config = VARIANTS[name]
    method, resumed, batch = build(config), build(config), noise(config)
    train_step(method, batch, torch.optim.SGD(method.trained_parameters(), lr=0.1), STEP)
    assert bool(method.center.any()) == (name == "centre")
    resumed.load_state_dict(method.state_dict())
    again = [train_step(m, batch, torch.optim.SGD(m.trained_parameters(), lr=0.1), STEP) for m in (method, resumed)]
    assert again[0] == again[1]
    for mine, theirs in zip(method.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


# ---------------------------------------------------------------------------------------------------- views
@pytest.mark.parametrize(("width", "height"), [(500, 375), (64, 64), (33, 20), (2000, 90), (3, 2)])
def test_student_crops_lie_in_the_teachers_crop(width: int, height: int) -> None:
    for image_id in range(20):
        draws = draw_views(build(TINY).view_plan().views, generator(0, 0, 0, image_id), width, height)
        assert [item.view for item in draws] == ["teacher", "global", "local", "local"]
        teacher, *student = (np.array(shown(item)) for item in draws)
        assert (teacher >= 0).all()
        assert (teacher <= [width, height, width, height]).all()
        for rect in student:
            assert (rect[:2] >= teacher[:2] - 1e-9).all()
            assert (rect[2:] <= teacher[2:] + 1e-9).all()
        assert all(item.affine[0, 0] > 0 for item in draws)  # no flip


def test_the_papers_teacher_views_show_one_place_in_two_colours() -> None:
    specs = build(PAPER).view_plan().views
    colours = []
    for image_id in range(30):
        first, again, *student = draw_views(specs, generator(0, 0, 0, image_id), 640, 427)
        np.testing.assert_allclose(first.affine, again.affine)
        assert [item.view for item in student] == ["global", "global"]
        colours.append(first.colour != again.colour)
    assert sum(colours) > 20


# --------------------------------------------------------------------------------------------------------- encoders
@pytest.mark.parametrize(
    ("encoder", "rule"),
    [
        (lambda: flsl_encoder(class_token=True), r"backbone\.class_token: false"),
        (lambda: flsl_encoder(pos_embed="learned"), r"backbone\.pos_embed: sincos"),
        (lambda: tiny_encoder(resnet=True), r"backbone\.name \(resnet10t\)"),
    ],
)
def test_other_encoders_need_a_word(encoder: Callable[[], Encoder], rule: str) -> None:
    with pytest.raises(ValueError, match=rule) as caught:
        build(TINY, encoder())
    assert "method.tokens: map" in str(caught.value)
    config = TINY | {"tokens": "map", "queries": {"window_global": 2, "window_local": 1}}
    terms = build(config, encoder())(noise(TINY))
    assert all(torch.isfinite(term) for term in terms.values())


@pytest.mark.parametrize(
    ("changes", "colours"),
    [
        ({}, "either"),
        ({"two_teacher_views": True}, "sequential"),
        ({"two_teacher_views": True, "colours": "either"}, "either"),
        ({"colours": "sequential"}, "sequential"),
    ],
)
def test_colours_are_the_codes_or_the_papers(changes: dict[str, Any], colours: str) -> None:
    settings = FLSLSettings.model_validate(changes)
    assert settings.colours == colours
    # Ray's workers and replays get the settings like this.
    assert FLSLSettings.model_validate(settings.model_dump(mode="json")) == settings
    method = build(TINY | {"colours": colours})
    rng = np.random.default_rng(0)
    drawn = [draw_colour(method.view_plan().views[0].photometric, rng) for _ in range(2000)]
    blurred, solarized = (np.array([name in each for each in drawn]) for name in ("blur", "solarize"))
    both = 0.5 * 0.2 if colours == "sequential" else 0.5 * 0.1 * 0.2
    assert np.mean(blurred) == pytest.approx(0.5 if colours == "sequential" else 0.5 * (0.5 + 0.1), abs=0.04)
    assert np.mean(solarized) == pytest.approx(0.2 if colours == "sequential" else 0.1, abs=0.03)
    assert np.mean(blurred & solarized) == pytest.approx(both, abs=0.025)


def test_settings_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"method\.queries\.window_local.*4 x 4 tokens of a crop of 16 pixels"):
        build(TINY | {"queries": {"window_local": 5}})
    with pytest.raises(ValidationError, match="two_teacher_views has none"):
        FLSLSettings.model_validate(TINY | {"two_teacher_views": True})
    with pytest.raises(ValidationError, match="two_teacher_views has none"):
        FLSLSettings(two_teacher_views=True, local_crops={"size": 96, "count": 2, "scale": (0.1, 0.4)})
    with pytest.raises(ValidationError, match=r"weights\.inter"):
        FLSLSettings(weights={"inter": 0})
    with pytest.raises(ValidationError, match="no such term volume"):
        FLSLSettings(weights={"volume": 1})


# ------------------------------------------------------------------------------------------------------ multi-stage
def test_an_earlier_teacher_holds_the_attention(tmp_path: Path) -> None:
    flsl_encoder(seed=3).save(tmp_path)
    batch = noise(TINY)
    plain = build(TINY)(batch)
    config = TINY | {"previous": {"encoder": "first", "mixture_bias": 0.0}}
    with pytest.raises(ValueError, match=r"method\.previous"):
        build(config)(batch)
    method = build(config)
    method.use_inputs({"previous.encoder": tmp_path})  # type: ignore[dict-item]
    shares = []
    for index in (0, 5, 9):
        method.start_step(Step(index, 10, 2))
        shares.append(method.present_share)
    assert shares[0] == 0 < shares[1] < shares[2] < 1
    method.start_step(Step(0, 10, 2))
    held = method(batch)
    assert torch.equal(held["intra"], plain["intra"])
    assert not torch.isclose(held["inter"], plain["inter"])
    method.present_share = 1.0  # only the present teacher counts
    torch.testing.assert_close(method(batch)["inter"], plain["inter"])
    # It is frozen, and a checkpoint brings it back.
    assert not any(p.requires_grad for p in method.previous.parameters())
    train_step(method, batch, torch.optim.SGD(method.trained_parameters(), lr=0.1), STEP)
    resumed = build(config)
    flsl_encoder(seed=4).save(tmp_path)
    resumed.use_inputs({"previous.encoder": tmp_path})  # type: ignore[dict-item]
    resumed.load_state_dict(method.state_dict())
    for each in (method, resumed):
        each.start_step(STEP)
    assert torch.equal(method(batch)["inter"], resumed(batch)["inter"])


def test_the_stage_trains_and_feeds_a_second_stage(run_stage: RunStage, images: Artifact) -> None:
    """Photographs of 48 x 40 pixels, smaller than the 64 pixel views."""
    sizes = {"teacher_crop": {"size": 64}, "global_crops": {"size": 64, "count": 1, "scale": [0.5, 1.0]}}
    flsl = {"name": "flsl", "local_crops": {"size": 32, "count": 1, "scale": [0.1, 0.4]}, **sizes}
    flsl["head"] = SMALL["method"]["head"]
    backbone = SMALL["backbone"] | {"class_token": False, "pos_embed": "sincos", "img_size": 64}
    settings = {"backbone": backbone, "method": flsl, "steps": 2, "resources": {"workers": 0}}
    outcome, first = run_stage("a" * 24, settings)
    assert {"intra", "inter", "vmr", "total"} <= set(outcome.metrics)

    config = PretrainConfig.model_validate(SMALL | settings | {"method": flsl | {"previous": {"encoder": "first"}}})
    assert {"method.previous.encoder": ("encoder",)}.items() <= {e.path: e.kinds for e in edges(config)}.items()
    run = assemble(config, {"images": images, "method.previous.encoder": first})
    (batch,) = run.data.batches(0, 1)
    run.method.train()
    assert all(torch.isfinite(term) for term in run.method(batch).values())
    assert not run.method.previous.training


def test_dsa_regularises_it() -> None:
    auxiliary = {"name": "vit_tiny_patch16_224", "patch_size": 8, "img_size": 32, "kwargs": {"depth": 1}}
    config = {"name": "dsa", "host": TINY | {"name": "flsl"}, "auxiliary": auxiliary}
    method = method_settings(config).build(flsl_encoder(), total_steps=10, steps_per_epoch=2, global_batch=8)
    terms = method.train()(noise(TINY))
    assert list(terms) == ["intra", "inter", "vmr", "dsa_am", "dsa_con"]
    (terms["dsa_am"] + terms["dsa_con"]).backward()
    assert all(torch.isfinite(term) for term in terms.values())
    gradient = next(
        p.grad for n, p in method.named_parameters() if n.endswith("student.encoder.model.patch_embed.proj.weight")
    )
    assert gradient.abs().sum() > 0


# ------------------------------------------------------------------------------------------------------------ ranks
RANKED = ["default", "paper", "centre", "sinkhorn"]


def _train(rank: int, world_size: int) -> Results:
    results: Results = {}
    for name in RANKED:
        batch = share(noise(VARIANTS[name]), rank, world_size)
        batch.views = {key: view.double() for key, view in batch.views.items()}
        results[name] = list(steps_of(build(VARIANTS[name]).double(), [batch] * 2, world_size, lr=0.1))
    return results


@pytest.mark.slow
def test_two_ranks_give_the_terms_and_gradients_of_one(tmp_path: Path) -> None:
    one, two = on_one_and_two(_train, tmp_path)
    for name, index, rank in itertools.product(RANKED, range(2), range(2)):
        mine, theirs = two[rank][name][index], one[name][index]
        assert_alike(f"{name}, step {index}", mine, theirs, terms=(1e-7, 1e-9), gradients=(1e-5, 1e-6))
