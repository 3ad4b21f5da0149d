"""Every method on models of several kinds: a plan refuses what a method cannot train, and what it lets pass trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from stages.models.encoder import Encoder
from stages.models.settings import Backbone
from stages.pretrain.config.method import MethodSettings, Start, method_settings
from stages.pretrain.data.batch import Batch
from tests.stages.pretrain.methods import test_d3ssl, test_flsl, test_vice
from tests.stages.pretrain.methods.tiny import CROPS, train_step
from tests.stages.pretrain.methods.tiny_hosts import HOSTS, OURS, STEP, a_batch, settings

TOKENS = {"embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN = {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2}
BACKBONES: dict[str, dict[str, Any]] = {
    "convnext": {"name": "test_convnext", "stride": 4},
    "efficientnet": {"name": "test_efficientnet", "stride": 4},
    "swin": {"name": "swin_tiny_patch4_window7_224", "img_size": 32, "stride": 4, "kwargs": SWIN},
    "dinov3": {"name": "vit_small_patch16_dinov3", "img_size": 32, "kwargs": TOKENS},
    "beit": {"name": "beit_base_patch16_224", "img_size": 32, "kwargs": TOKENS},
}
VICE = test_vice.SMALL | {"name": "vice"}
D3SSL = test_d3ssl.SMALL | {"name": "d3ssl"}
FLSL = test_flsl.TINY | {"name": "flsl", "tokens": "map"}
METHODS: dict[str, tuple[MethodSettings, Callable[[Any], Batch]]] = {
    **{name: (settings(name), lambda config: a_batch()) for name in [*HOSTS, *OURS]},
    "dsa": (settings("byol", dsa=True), lambda config: a_batch()),
    "dsa of d3ssl": (
        method_settings({"name": "dsa", "host": D3SSL, "auxiliary": {"name": "test_vit"}, "eta": 3}),
        lambda config: test_d3ssl.drawn_batch(config.host),
    ),
    "vice": (method_settings(VICE), test_vice.drawn_batch),
    "vice, deeplab": (method_settings(VICE | {"decoder": {"name": "deeplab", "width": 16}}), test_vice.drawn_batch),
    "d3ssl": (method_settings(D3SSL), test_d3ssl.drawn_batch),
    "flsl": (method_settings(FLSL), lambda config: test_flsl.noise(FLSL)),
}
MULTI_CROP = ("vicregl", "swav", "dino", "dino_dense", "cotap", "d3ssl", "dsa of d3ssl", "flsl")


def refused(name: str, backbone: str) -> list[str]:
    """The options that a plan complains about, by what the methods' papers need."""
    if name == "mae":
        return ["name"]
    prefix = "host." if name == "dsa of d3ssl" else ""
    found = []
    if backbone in ("beit", "convnext") and name in MULTI_CROP:  # one size of images only; no view below 32 pixels
        found.append(prefix + ("small_size" if "d3ssl" in name else "local_crops.size"))
    if backbone in ("dinov3", "beit"):  # 2 x 2 cells of 16 pixels, and one in small views
        if "d3ssl" in name:
            found.append(f"{prefix}small_size")
        if name == "flsl":
            found.append("local_crops.size")
    return found


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", METHODS)
def test_a_plan_refuses_or_a_step_trains(name: str, backbone: str) -> None:
    torch.manual_seed(0)
    start = Start(Backbone.model_validate(BACKBONES[backbone]), filtered=False)
    config, make_batch = METHODS[name]
    found = list(config.misfits(start))
    assert sorted(path for path, _, _ in found) == sorted(refused(name, backbone))
    if found:
        assert all(what and remedy and "\n" not in what + remedy for _, what, remedy in found)
        return
    encoder = Encoder.build(start.backbone)
    method = config.build(encoder, total_steps=10, steps_per_epoch=2, global_batch=8).train()
    before = {key: value.detach().clone() for key, value in encoder.named_parameters()}
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # d3ssl has no negatives before the second
        terms = train_step(method, make_batch(config), optimizer, STEP)
        assert all(torch.tensor(value).isfinite() for value in terms.values()), terms
    assert any(not torch.equal(value, before[key]) for key, value in encoder.named_parameters())


@pytest.mark.parametrize("name", ["dino_dense", "cotap", "vicregl"])
def test_terms_of_patches_need_some(name: str) -> None:
    config = method_settings({**HOSTS, **OURS}[name] | CROPS)
    [(path, what, remedy)] = config.misfits(Start(Backbone(name="resnet18"), filtered=False))
    assert (path, remedy) == ("global_crops.size", "raise it to 33 or more, or backbone.stride to 16")
    assert what.startswith("the map of resnet18 has 1 x 1 cells at 32 pixels, too few for ")


def test_methods_of_plain_vits_say_so() -> None:
    start = Start(Backbone(name="vit_small_patch16_dinov3"), filtered=False)
    pre_last = {"placement": "pre_last"}
    cotap = method_settings({"name": "cotap", "neighbors": "knn", "filter": pre_last})
    assert [path for path, _, _ in cotap.misfits(start)] == ["filter.placement"]
    assert [path for path, _, _ in method_settings({"name": "flsl"}).misfits(start)] == ["tokens"]
    assert [path for path, _, _ in method_settings({"name": "mae"}).misfits(start)] == ["name"]
