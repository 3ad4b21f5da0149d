"""Every method that DSA regularises with tiny settings, DSA around it, and a step of training."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stages.pretrain.config.method import MethodSettings, method_settings
from stages.pretrain.data.batch import Batch
from stages.pretrain.methods.method import Method, Step
from tests.stages.pretrain.methods.ranks import Results, Worker, assert_alike, on_one_and_two, steps_of
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
    own = {} if knobs.get("variant") == "released" else {"hidden": 14}
    return method_settings({"name": "dsa", "host": host, "eta": 3, **own, **source, **knobs})


def build(config: MethodSettings, *, resnet: bool = False) -> Method:
    method = config.build(tiny_encoder(resnet=resnet), total_steps=10, steps_per_epoch=2, global_batch=8)
    for module in method.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0  # so that runs can be compared
    return method.train()


def a_batch() -> Batch:
    batch = fake_batch()
    generator = torch.Generator().manual_seed(9)
    batch.extras["embedding"] = torch.randn(8, 5, generator=generator)
    batch.views["original"] = torch.randn(1, 8, 3, 24, 24, generator=generator)  # for DSA's released variant
    return batch


def silent(method: nn.Module) -> list[str]:
    """Trained parameters without a gradient. The bias before a softmax over rows shifts all its logits alike."""
    return [
        name
        for name, parameter in method.named_parameters()
        if parameter.requires_grad
        and (parameter.grad is None or not parameter.grad.abs().sum() > 0)
        and name != "arranger.output.bias"
    ]


def train_on_rank(methods: Iterable[tuple[str, MethodSettings]], rank: int, world_size: int) -> Results:
    """Three steps of each method in float64, on this rank's share of a batch."""
    results: Results = {}
    for name, config in methods:
        method = build(config, resnet=name == "byol").double()
        batch = share(a_batch(), rank, world_size)
        for tensors in (batch.views, batch.affines, batch.extras):
            tensors.update({key: value.double() for key, value in tensors.items()})
        results[name] = list(steps_of(method, [batch] * 3, world_size, lr=0.05))
    return results


def assert_ranks_train_alike(worker: Worker, folder: Path) -> None:
    """Two ranks give the terms and gradients of one, in every step of every method."""
    one, two = on_one_and_two(worker, folder)
    for name, index, rank in itertools.product(one, range(3), range(2)):
        mine, theirs = two[rank][name][index], one[name][index]
        assert_alike(f"{name}, step {index}", mine, theirs, terms=(1e-5, 1e-8), gradients=(1e-4, 1e-5))
