"""CoTAP's object-aware filter and prototype term, single- and multi-head, values and gradients (oaf_*.npz)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stages.models.feature_extractor import ObjectAwareFilter
from stages.pretrain.methods.cotap.losses.prototype_entropy import prototype_entropy
from tests.golden.golden import assert_close, tensors

FILES = ["oaf_single_head", "oaf_multi_head"]


def build(golden: dict[str, Any], placement: str = "post") -> ObjectAwareFilter:
    prototypes, kernel, _, width = golden["U"].shape
    module = ObjectAwareFilter(
        width,
        prototypes,
        heads=int(golden["heads"]),
        attention_width=len(golden["Wq"]),
        kernel=kernel,
        out_projection=False,
    ).double()
    with torch.no_grad():
        module.prototypes.copy_(golden["U"])
        module.query.weight.copy_(golden["Wq"])
        module.key.weight.copy_(golden["Wk"])
        module.value.weight.copy_(golden["Wv"])
    return module


@pytest.mark.parametrize("name", FILES)
def test_filtered_map(name: str) -> None:
    golden = tensors(name)
    module = build(golden)
    h_1Chw = golden["h"].permute(2, 0, 1)[None]
    mu = module.scores(h_1Chw)[0]
    assert_close(mu, golden["mu"], 1e-10)
    scale = (module.attention_width // module.heads) ** 0.5
    assert_close((mu / scale).softmax(dim=-1), golden["attn"], 1e-10)
    assert_close(module.value(module.prototypes).mean(dim=(1, 2)), golden["U_v_bar"], 1e-10)
    assert_close(module(h_1Chw)[0].permute(1, 2, 0), golden["h_o"], 1e-10)


@pytest.mark.parametrize("name", FILES)
def test_prototype_term_and_gradient(name: str) -> None:
    golden = tensors(name)
    module = build(golden)
    pooled = module.pooled(golden["F"].permute(0, 3, 1, 2))
    assert_close(pooled.reshape(golden["F_down"].shape), golden["F_down"], 1e-10)
    loss = prototype_entropy(module.prototypes.flatten(1), pooled, temperature=golden["tau3"].item())
    loss.backward()
    assert_close(loss, golden["loss_proto"], 1e-10)
    assert_close(module.prototypes.grad, golden["grad_U"], 1e-10)
