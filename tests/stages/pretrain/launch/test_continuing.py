"""A training that goes on from the state that another stage has kept."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import StageFailed
from pipeline.store.artifact import Artifact
from stages.training.schedules import cosine
from tests.stages.pretrain.conftest import RunStage

LR = 1e-3
# A queue, a projector, a teacher and an optimiser with moments: all that a state holds.
MOCO = {"method": {"name": "moco", "queue": 20, "size": 32, "projector": {"hidden": 16, "out": 12}}}
CONSTANT = {**MOCO, "optimizer": {"lr": LR, "lr_end": LR}, "resources": {"workers": 0}}


def rows(artifact: Artifact) -> list[dict[str, float]]:
    """The curves without what the machine's speed gives."""
    return [
        {name: value for name, value in row.items() if name != "images_per_s"}
        for row in json.loads(artifact.read("curves.json"))
    ]


def weights(artifact: Artifact, name: str = "encoder.safetensors") -> dict[str, torch.Tensor]:
    return load_file(artifact.local(name))


def test_40_steps_and_20_more_equal_60_where_the_schedules_are_constant(run_stage: RunStage) -> None:
    _, whole = run_stage("a" * 24, {"steps": 60, **CONSTANT})
    said: list[str] = []
    outcome, first = run_stage("b" * 24, {"steps": 40, "keep_state": True, **CONSTANT}, say=said.append)
    kept = sum(entry.size for entry in first.manifest.files if entry.name.startswith("training_state/"))
    assert outcome.notes["training_state_bytes"] == kept
    assert said == [f"keeps the state of the training in the artifact: {kept / 2**20:.1f} MiB"]
    said.clear()
    settings = {"steps": 60, "continue": "first", **CONSTANT}
    outcome, longer = run_stage("c" * 24, settings, say=said.append, **{"continue": first})
    assert said[0].startswith("goes on from step 40 of 'train' towards 60 steps in all; learning rate and all other")
    assert outcome.counts["steps"] == 60
    assert rows(longer) == rows(whole)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(longer)[name]), name


def test_schedules_are_those_of_one_training_of_the_new_length(run_stage: RunStage) -> None:
    """The learning rate had fallen to its end after 8 steps, and goes on where a cosine over 16 has it at step 8."""
    falling = {**CONSTANT, "optimizer": {"lr": LR, "lr_end": 0.0}}
    _, first = run_stage("a" * 24, {"steps": 8, "keep_state": True, **falling})
    _, longer = run_stage("b" * 24, {"steps": 16, "continue": "first", **falling}, **{"continue": first})
    rates = [row["lr"] for row in rows(longer)]
    assert rates[:8] == [cosine(step, 8, LR, 0.0) for step in range(8)]
    assert rates[8:] == [cosine(step, 16, LR, 0.0) for step in range(8, 16)]


def test_a_killed_continuation_resumes_from_its_own_checkpoint(run_stage: RunStage) -> None:
    _, first = run_stage("a" * 24, {"steps": 6, "keep_state": True, **CONSTANT})
    settings = {"steps": 12, "continue": "first", "checkpoint_every": 1, **CONSTANT}

    class Killed(Exception):
        pass

    def kill(metrics: object, step: int) -> None:
        if step == 9:
            raise Killed

    with pytest.raises(Killed):
        run_stage("b" * 24, settings, kill, **{"continue": first})
    seen: list[int] = []
    _, cut = run_stage("b" * 24, settings, lambda metrics, step: seen.append(step), **{"continue": first})
    assert seen[:4] == [9, 10, 11, 12]  # the checkpoint of step 8 is its own; the kept state is of step 6
    _, whole = run_stage("c" * 24, settings, **{"continue": first})
    assert rows(cut) == rows(whole)


def test_no_step_left_to_make_is_said(run_stage: RunStage) -> None:
    _, first = run_stage("a" * 24, {"steps": 12, "keep_state": True, **CONSTANT})
    settings = {"epochs": 2, "continue": "first", **CONSTANT}  # 24 images in batches of 4: 12 steps
    with pytest.raises(StageFailed, match="'train' has made 12 steps, and this stage should make 12 in all"):
        run_stage("b" * 24, settings, **{"continue": first})


@pytest.mark.slow
def test_ray_trains_on_from_a_state_that_a_plain_process_kept(run_stage: RunStage, ray_local: None) -> None:
    _, first = run_stage("a" * 24, {"steps": 4, "keep_state": True, **CONSTANT})
    settings = {"steps": 8, "continue": "first", "keep_state": True, **CONSTANT}
    _, alone = run_stage("b" * 24, settings, **{"continue": first})
    on_ray = {**settings, "resources": {"workers": 2, "cpus": 0.5}}
    _, ranks = run_stage("c" * 24, on_ray, **{"continue": first})
    assert [row["step"] for row in rows(ranks)] == [row["step"] for row in rows(alone)]
    totals = [torch.tensor([row["total"] for row in rows(artifact)]) for artifact in (ranks, alone)]
    torch.testing.assert_close(*totals, rtol=1e-3, atol=1e-4)
    assert any(entry.name == "training_state/state.pt" for entry in ranks.manifest.files)
