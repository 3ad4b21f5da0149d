"""The config of pre-training: its edges, its rules, what is fingerprinted of it."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from pipeline.stage import edges, unfingerprinted
from stages.pretrain.config.pretrain import PretrainConfig

ONE_CROP = {"size": 64, "count": 1, "scale": (0.2, 1.0)}
COTAP = {
    "images": [{"from": "objects", "weight": 1}, {"from": "scenes", "weight": 1, "role": "scenes"}],
    "init": "warmup",
    "method": {"name": "cotap", "neighbors": "neighbors"},
    "epochs": 2,
}


def test_edges_of_mixed_sources_and_of_the_method_are_found() -> None:
    found = {edge.path: (edge.stage, edge.kinds) for edge in edges(PretrainConfig.model_validate(COTAP))}
    assert found == {
        "images.0.from": ("objects", ("images",)),
        "images.1.from": ("scenes", ("images",)),
        "init": ("warmup", ("encoder",)),
        "method.neighbors": ("neighbors", ("neighbors",)),
    }


def test_what_cannot_change_the_encoder_is_not_fingerprinted() -> None:
    free = unfingerprinted(PretrainConfig.model_validate(COTAP))
    assert {"resources", "log_every", "checkpoint_every", "loader_workers"} <= set(free)
    assert {"checkpoint_minutes", "max_failures", "lost_rank_minutes", "strategy"} <= set(free)
    assert not {"precision", "batch_size", "seed", "renderer"} & set(free)


def test_settings_of_the_method_survive_a_dump() -> None:
    config = PretrainConfig.model_validate({**COTAP, "method": {**COTAP["method"], "weights": {"sc_patch": 0.5}}})
    again = PretrainConfig.model_validate(config.model_dump(mode="json", by_alias=True))
    assert again == config
    assert again.method.weights == {"sc_patch": 0.5}


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"steps": 5}, "exactly one of the two"),
        ({"epochs": None}, "exactly one of the two"),
        ({"init": None}, "init, backbone"),
        ({"batch_size": 10, "accumulate": 4}, "does not divide"),
        ({"method": {"name": "cotop"}}, "no method is called 'cotop'"),
        ({"method": {"name": "dino", "weights": {"dine": 1.0}}}, "no such term dine"),
        ({"method": {"name": "dino", "global_crops": ONE_CROP, "local_crops": {**ONE_CROP, "count": 0}}}, "at least 2"),
        ({"method": {"name": "swav", "global_crops": {**ONE_CROP, "count": 0}}}, r"global_crops\.count: .* at least 1"),
        ({"method": {"name": "vicregl", "global_crops": ONE_CROP}}, "at least 2 in all"),
        ({"learning_rate": 1.0}, "Extra inputs"),
    ],
)
def test_broken_rules_are_named(change: dict[str, object], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        PretrainConfig.model_validate({**COTAP, **change})
