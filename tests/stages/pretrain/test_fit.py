"""Batch, passes, workers, queues and images: what is refused in a plan and at the start, and what is only stated."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import UsageError
from stages.pretrain.config.pretrain import PretrainConfig
from stages.pretrain.fit import check_start, conflicts, remarks

SIMCLR = {"images": "photos", "backbone": {"name": "resnet18"}, "method": {"name": "simclr"}, "steps": 1}
MIXED = {"images": [{"from": "objects", "weight": 63}, {"from": "scenes", "role": "scenes"}]}
COTAP = {"name": "cotap", "neighbors": "knn"}
D3SSL = {"name": "d3ssl", "boxes": "boxes"}


def found(*, workers: int | None = None, splits: dict[str, int] | None = None, **settings: Any) -> list[str]:
    config = PretrainConfig.model_validate({**SIMCLR, "batch_size": 16, **settings})
    notes = {path: splits and {"splits": splits} for path, _ in config.image_sources()}
    return [f"{path}: {what} ({remedy})" for path, what, remedy in conflicts(config, workers=workers, notes=notes)]


def stated(splits: dict[str, int], **settings: Any) -> list[str]:
    config = PretrainConfig.model_validate({**SIMCLR, "batch_size": 16, **settings})
    return list(remarks(config, {path: {"splits": splits} for path, _ in config.image_sources()}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"workers": 3},
            "batch_size: a forward pass has 16 images, which 3 workers cannot share equally (set batch_size to 15 or "
            "18, or resources.workers to 2)",
        ),
        (
            {"workers": 3, "accumulate": 8},
            "batch_size: a forward pass has 2 images (batch_size / accumulate), which 3 workers cannot share equally "
            "(set batch_size to 24, or resources.workers to 2)",
        ),
        ({"workers": 20}, "(set batch_size to 20, or resources.workers to 16)"),
        (
            {"accumulate": 16},
            "batch_size: a forward pass has 1 images (batch_size / accumulate), and simclr compares different images "
            "of a pass (set batch_size to 32 or more)",
        ),
        ({"strategy": "fsdp2", "method": COTAP}, "strategy: fsdp2: cotap does not call the same modules on all ranks"),
        (
            {"strategy": "fsdp2", "method": {"name": "dino"}, "optimizer": {"name": "lars"}},
            "each rank holds a part of it (set strategy: ddp, or optimizer.name to adamw or sgd)",
        ),
        ({"batch_size": 1, "method": COTAP}, "cotap compares different images"),
        ({"batch_size": 1, "method": D3SSL}, "d3ssl compares different images"),
        (
            {"batch_size": 1, "method": {"name": "dsa", "host": {"name": "byol"}, "embeddings": "clip"}},
            "dsa compares different images",
        ),
        (
            {"workers": 4, "method": {"name": "swav", "queue": 10}},
            "method.queue: 10 entries cannot be shared equally by 4 workers (set it to 8 or 12)",
        ),
        (
            {"workers": 4, "method": {"name": "dsa", "host": {"name": "swav", "queue": 2}, "embeddings": "clip"}},
            "method.host.queue: 2 entries cannot be shared equally by 4 workers (set it to 4)",
        ),
        (
            MIXED,
            "images.1.from: a forward pass has 16 images, and a weight of 1 leaves none of them to scenes (raise its "
            "weight, or batch_size)",
        ),
        (
            {"splits": {"train": 15, "val": 90}},
            "batch_size: a step takes 16 images, and photos has 15 to train on: it would hold images twice (set "
            "batch_size to 15 or fewer)",
        ),
        ({"splits": {"train": 90, "val": 15}, "split": "val"}, "photos has 15 to train on"),
        (
            {"splits": {"train": 90, "val": 15}, "split": "test"},
            "split: photos has no image of split 'test' (its splits: train, val)",
        ),
        ({**MIXED, "batch_size": 64, "splits": {"all": 30}}, "objects and scenes have 60 to train on"),
    ],
)
def test_what_does_not_fit_is_named_with_a_remedy(settings: dict[str, Any], message: str) -> None:
    (only,) = found(**settings)
    assert message in only


@pytest.mark.parametrize(
    "settings",
    [
        {"workers": 2, "splits": {"all": 16}},
        {"workers": None, "accumulate": 8},
        {"batch_size": 1, "method": {**COTAP, "weights": {"sc_patch": 0}}},
        {"batch_size": 1, "method": {**D3SSL, "weights": {"deposition": 0}}},
        {"batch_size": 1, "method": {"name": "moco"}},
        {"batch_size": 10, "workers": 2, "method": COTAP},  # five images a worker
        {**MIXED, "batch_size": 64},
        {"workers": 4, "method": {"name": "swav", "queue": 0}},
        {"workers": 3, "batch_size": 9, "method": {"name": "moco", "queue": 10}},
    ],
)
def test_what_fits_is_let_through(settings: dict[str, Any]) -> None:
    assert found(**settings) == []


def test_remedies_work() -> None:
    for batch_size in (15, 18, 24):
        assert found(workers=3, batch_size=batch_size) == []
    assert found(workers=2, accumulate=8) == found(workers=16) == []


@pytest.mark.parametrize(
    ("settings", "remark"),
    [
        (
            {"method": {"name": "moco"}},
            "method.queue: 65536 entries are more than one pass over the 50 images gives (50), so that it holds older "
            "entries of an image beside its newest",
        ),
        ({"method": {"name": "ressl", "queue": 8}}, "method.queue: it keeps the last 8 of the 16 entries that a step"),
        (
            {"method": {**D3SSL, "bank": {"size": 401}}},
            "method.bank.size: 401 entries are more than one pass over the 50 images gives (400)",
        ),
        (
            {**MIXED, "batch_size": 64},
            "images.0.from: a step takes 63 images from its 50, so that it holds some of them more than once",
        ),
    ],
)
def test_what_is_worth_knowing_is_stated(settings: dict[str, Any], remark: str) -> None:
    (only,) = stated({"train": 50}, **settings)
    assert only.startswith(remark)


def test_the_start_of_a_training_states_it() -> None:
    config = PretrainConfig.model_validate({**SIMCLR, "batch_size": 16, "method": {"name": "moco", "queue": 51}})
    said: list[str] = []
    images = SimpleNamespace(manifest=SimpleNamespace(notes={"splits": {"train": 50}}))
    context: Any = SimpleNamespace(inputs={"images": images}, say=said.append)
    check_start(config, context, (2, 2))
    assert [line.split(",")[0] for line in said] == [
        "method.queue: 51 entries are more than one pass over the 50 images gives (50)"
    ]
    with pytest.raises(UsageError, match="3 workers cannot share equally"):
        check_start(config, context, (3, 3))


def test_nothing_is_stated_about_what_is_usual() -> None:
    assert stated({"train": 50}, method={**D3SSL, "bank": {"size": 400}}) == []
    assert stated({"train": 50}, method={"name": "moco", "queue": 50}) == []
    assert stated({"train": 50}, method={"name": "moco", "version": "v3"}) == []
