"""A training that stops early, and goes on from there in another artifact of the same work."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from pipeline.errors import StageFailed
from pipeline.stage import Context
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.pretrain.config.pretrain import PretrainConfig
from stages.pretrain.stage import Pretrain
from tests.stages.pretrain.conftest import SMALL

ALONE, ON_RAY = {"workers": 0}, {"workers": 1, "cpus": 1}
WHOLE = "a" * 24

Train = Callable[..., Artifact]


@pytest.fixture
def train_to(store: ArtifactStore, images: Artifact) -> Train:
    """`train_to(stop_at, steps_done, resources)` runs the training of WHOLE up to there and commits what it made."""

    def run(stop_at: int | None, made: list[int], resources: dict[str, Any], whole: str = WHOLE) -> Artifact:
        settings = {**SMALL, "steps": 6, "stop_at": stop_at, "resources": resources}
        config = PretrainConfig.model_validate(settings)
        fingerprint = whole if stop_at is None else f"{stop_at:024d}"
        output = store.begin("encoder", fingerprint, whole)
        context = Context("train", fingerprint, {"images": images}, output, config.resources)
        context.log_metrics = lambda metrics, step: made.append(step)
        outcome = Pretrain(config).run(context)
        return output.commit(stage="train", metrics=outcome.metrics, counts=outcome.counts, preview=outcome.preview)

    return run


def assert_equal(one: Artifact, other: Artifact) -> None:
    weights = load_file(other.local("encoder.safetensors"))
    for name, value in load_file(one.local("encoder.safetensors")).items():
        assert torch.equal(value, weights[name]), name


def test_a_stopped_training_goes_on_to_the_artifact_that_a_plain_one_makes(train_to: Train) -> None:
    plain = train_to(None, [], ALONE, "b" * 24)
    first, second = train_to(2, [], ALONE), train_to(4, [], ALONE)
    last = train_to(None, [], ALONE)
    assert [artifact.manifest.counts["steps"] for artifact in (first, second, last)] == [2, 4, 6]
    assert [row["step"] for row in json.loads(last.read("curves.json"))] == [1, 2, 3, 4, 5, 6]
    assert_equal(last, plain)
    with pytest.raises(AssertionError):
        assert_equal(first, plain)


@pytest.mark.slow
def test_on_ray_train_it_goes_on_likewise(train_to: Train, ray_local: None) -> None:
    first, last = train_to(4, [], ON_RAY), train_to(None, made := [], ON_RAY)
    assert first.manifest.counts["steps"] == 4
    assert made[:2] == [5, 6]  # the rows before them are taken over at the end
    before, rows = (json.loads(artifact.read("curves.json")) for artifact in (first, last))
    assert rows[:4] == before  # taken over, their measured speed included
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_only_the_missing_steps_are_made(train_to: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.training import loop

    steps: list[int] = []
    update = loop.update
    monkeypatch.setattr(
        loop, "update", lambda method, optimizer, step: (steps.append(step.index), update(method, optimizer, step))
    )
    train_to(2, [], ALONE)
    train_to(4, [], ALONE)
    train_to(None, [], ALONE)
    assert steps == [0, 1, 2, 3, 4, 5]


def test_what_has_gone_further_cannot_stop_earlier(train_to: Train) -> None:
    train_to(4, [], ALONE)
    with pytest.raises(StageFailed, match=r"stop_at: this training has gone on to step 4 already, beyond 2"):
        train_to(2, [], ALONE)


def test_a_stop_at_or_after_the_end_is_refused() -> None:
    with pytest.raises(ValidationError, match="stop_at: the training has 6 steps"):
        PretrainConfig.model_validate({**SMALL, "steps": 6, "stop_at": 6})
