"""Variants of linear segmentation: decoders, optimisers and schedules, windows, square crops; the default as ever."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from stages.evaluate.segment_linear import SegmentLinear
from stages.evaluate.segment_linear_settings import ProbeTraining, SegmentLinearConfig
from stages.evaluate.segment_linear_views import ScoredImage, joined, square_crop
from stages.evaluate.segmentation_decoders import draws, fit, make_decoder, rate_factor
from tests.conftest import ROOT

from .conftest import RunStage
from .test_segment_linear import SMALL

CPU = torch.device("cpu")


def settings(**options: Any) -> SegmentLinearConfig:
    return SegmentLinearConfig.model_validate({"images": "i", "encoder": "e", **options})


@pytest.fixture
def cached() -> tuple[Any, Any]:
    """Feature maps (30, 5, 4, 6), and labels (30, 9, 9) with some void."""
    generator = np.random.default_rng(0)
    labels = generator.integers(-1, 3, (30, 9, 9)).astype(np.int16)
    return generator.normal(size=(30, 5, 4, 6)).astype(np.float16), labels


def test_the_default_is_adam_on_a_linear_layer(cached: tuple[Any, Any]) -> None:
    """Against a loop that enlarges by `interpolate` and averages over all pixels that count."""
    maps, labels = cached
    rows = np.arange(2, 30)
    found = fit(maps, labels, rows, 3, lr=0.02, config=settings(samples=100, batch_size=8, seed=4), device=CPU)
    weight = torch.nn.init.normal_(torch.empty(3, 5), std=0.01, generator=torch.Generator().manual_seed(4))
    weight, bias = weight.requires_grad_(), torch.zeros(3, requires_grad=True)
    adam = torch.optim.Adam([weight, bias], lr=0.02)
    for chosen in draws(rows, 100, 8, 4):
        logits = functional.conv2d(torch.from_numpy(maps[chosen]).float(), weight[:, :, None, None], bias)
        logits = functional.interpolate(logits, (9, 9), mode="bilinear")
        loss = functional.cross_entropy(logits, torch.from_numpy(labels[chosen]).long(), ignore_index=-1)
        adam.zero_grad()
        loss.backward()
        adam.step()
    torch.testing.assert_close(found.last.weight[:, :, 0, 0], weight.detach(), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.last.bias, bias.detach(), atol=1e-4, rtol=1e-3)


def test_options_that_are_not_set_are_in_no_fingerprint() -> None:
    new = {"epochs", "decoder", "fcn_width", "dropout", "training", "zoom", "slide", "score_size"}
    assert not new & set(settings().model_dump())
    chosen = {
        "epochs": 3,
        "decoder": "fcn",
        "fcn_width": 8,
        "dropout": 0.1,
        "training": {},
        "zoom": [0.5, 2],
        "slide": 9,
    }
    assert new & set(settings(**chosen, score_size=5).model_dump()) == new


def test_the_documented_variants_are_configs() -> None:
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    block = page.split("Variants, each a few options", 1)[1].split("```")[1].removeprefix("yaml")
    written = [yaml.safe_load("{" + one) for one in re.sub(r"(?m)^#.*$", "", block).split("\n{")[1:]]
    variants = [settings(**options) for options in written]
    assert [variant.decoder for variant in variants] == ["fcn", "linear", "batch_norm"]
    assert [variant.training.optimizer for variant in variants if variant.training] == ["adam", "sgd", "adamw"]
    ade20k = variants[2]
    assert ade20k.samples == 40_000 * ade20k.batch_size
    assert ade20k.training is not None
    assert ade20k.training.warmup == 1500 * ade20k.batch_size


def test_logits_of_enlarged_features_are_enlarged_logits() -> None:
    """Leopart enlarges the features, this stage the logits of a 1x1 convolution: the same."""
    decoder = make_decoder(settings(), 7, 3)
    with torch.no_grad():
        decoder.last.bias.normal_()
    maps = torch.randn(2, 7, 5, 6)
    torch.testing.assert_close(
        decoder(functional.interpolate(maps, (100, 100), mode="bilinear")),
        functional.interpolate(decoder(maps), (100, 100), mode="bilinear"),
        atol=1e-5,
        rtol=1e-4,
    )


def test_the_fcn_is_three_blocks_that_double_the_size() -> None:
    decoder = make_decoder(settings(decoder="fcn", fcn_width=8), 5, 3)
    kinds = [type(layer).__name__ for layer in decoder.before]
    assert kinds == (["Conv2d", "ReLU"] * 3 + ["Upsample"]) * 3
    kernels = [layer.kernel_size[0] for layer in decoder.before if isinstance(layer, torch.nn.Conv2d)]
    assert kernels == [1, 3, 1] * 3
    assert decoder(torch.randn(2, 5, 4, 6)).shape == (2, 3, 32, 48)
    same = make_decoder(settings(decoder="fcn", fcn_width=8), 5, 3)
    assert all(torch.equal(a, b) for a, b in zip(decoder.parameters(), same.parameters(), strict=True))


def test_a_batch_norm_brings_channels_to_one_scale(cached: tuple[Any, Any]) -> None:
    maps, labels = cached
    shifted = (maps * np.array([0.1, 1, 10, 1, 1])[:, None, None] + 3).astype(np.float16)
    config = settings(decoder="batch_norm", dropout=0.1, samples=1200, batch_size=10)
    decoder = fit(shifted, labels, np.arange(30), 3, lr=0.01, config=config, device=CPU)
    assert not decoder.training
    norm: Any = decoder.before[0]
    np.testing.assert_allclose(norm.running_mean, shifted.astype(float).mean(axis=(0, 2, 3)), rtol=0.1)
    np.testing.assert_allclose(norm.running_var, shifted.astype(float).var(axis=(0, 2, 3)), rtol=0.2)
    again = fit(shifted, labels, np.arange(30), 3, lr=0.01, config=config, device=CPU)
    assert torch.equal(decoder.last.weight, again.last.weight), "dropout has the seed"


@pytest.mark.parametrize(
    ("recipe", "factors"),
    [
        ({}, [1, 1, 1, 1]),
        ({"schedule": "step"}, [1, 1, 1, 0.1]),
        ({"schedule": "cosine", "final_lr": 0.002}, [1, 0.6, 0.2 + 0.8 * (1 - 2**0.5 / 2) / 2, 0.2 + 0.8 * 0.0244717]),
        ({"schedule": "linear"}, [1, 0.5, 0.25, 0.1]),
        ({"schedule": "linear", "warmup": 500}, [1 / 501, 1, 0.5, 0.2]),
    ],
)
def test_learning_rates_over_a_training(recipe: dict[str, Any], factors: list[float]) -> None:
    found = [rate_factor(ProbeTraining(**recipe), done, 1000, 0.01) for done in (0, 500, 750, 900)]
    assert found == pytest.approx(factors, abs=1e-6)


def test_sgd_and_adamw_take_their_weight_decay(cached: tuple[Any, Any]) -> None:
    maps, labels = cached
    norms = {}
    for name in ("sgd", "adamw"):
        for decay in (0.0, 0.5):
            config = settings(samples=300, batch_size=10, training={"optimizer": name, "weight_decay": decay})
            decoder = fit(maps, labels, np.arange(30), 3, lr=0.1, config=config, device=CPU)
            norms[name, decay] = decoder.last.weight.norm().item()
    assert norms["sgd", 0.5] < norms["sgd", 0.0]
    assert norms["adamw", 0.5] < norms["adamw", 0.0]


def test_epochs_are_passes_over_the_crops(run: RunStage) -> None:
    few = {key: value for key, value in SMALL.items() if key != "samples"} | {"random_baseline": False}
    by_epochs, _ = run(SegmentLinear, **few, epochs=3)
    by_samples, _ = run(SegmentLinear, fingerprint="m2", **few, samples=60)
    assert by_epochs.metrics == by_samples.metrics, "20 train images, 3 times"


def test_windows_are_averaged_where_they_meet() -> None:
    image: Any = ScoredImage(0, "", [], [(0, 0), (0, 2)], (4, 6), np.zeros(0), np.zeros(0))
    logits = torch.stack([torch.full((1, 2, 2), 1.0), torch.full((1, 2, 2), 5.0)])
    assert joined(logits, image, 4)[0, 0].tolist() == [[1, 1, 3, 3, 5, 5]] * 4


@given(st.integers(0, 2**32 - 1), st.sampled_from([(0.5, 0.9), (1.1, 2.0)]))
def test_square_crops_are_padded_with_void(seed: int, zoom: tuple[float, float]) -> None:
    pixels, labels = np.full((20, 30, 3), 7, np.uint8), np.ones((20, 30), np.int16)
    crop, void = square_crop(np.random.default_rng(seed), pixels, labels, zoom)
    side = len(crop)
    assert crop.shape == (side, side, 3)
    assert void.shape == (side, side)
    assert 20 / zoom[1] - 1 <= side <= 20 / zoom[0] + 1
    assert ((crop == 7).all(axis=2) == (void == 1)).all()
    assert (void == 1).sum() == min(20, side) * min(30, side)
    assert (void == -1).any() == (side > 20)


@pytest.mark.parametrize(
    "variant",
    [
        {"decoder": "fcn", "fcn_width": 16, "label_size": 32, "training": {"schedule": "cosine", "final_lr": 1e-4}},
        {"score_size": 8, "absent": "zero", "lr": 0.1, "training": {"optimizer": "sgd", "schedule": "step"}},
        {"decoder": "batch_norm", "dropout": 0.1, "zoom": (0.8, 2.0), "crops": 2, "slide": 21},
    ],
)
def test_variants_learn_the_colours(run: RunStage, variant: dict[str, Any]) -> None:
    outcome, made = run(SegmentLinear, **(SMALL | {"random_baseline": False} | variant))
    assert outcome.metrics["miou"] > 55
    assert outcome.counts["test"] == 10
    assert made.read("preview.png").startswith(b"\x89PNG")
