"""A run that goes wrong leaves a file, and the file alone gives the same step again."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.errors import ArtifactMissing, StageFailed
from stages.pretrain.data.batch import Batch
from stages.pretrain.launch import replay
from stages.pretrain.methods.dino.method import Dino
from tests.stages.pretrain.conftest import RunStage

ALONE = {"resources": {"workers": 0}}


def file_in(message: str) -> str:
    found = re.search(r"python -m stages\.pretrain\.launch\.replay (\S+)", message)
    assert found, message
    return found[1]


def test_a_collapse_leaves_a_file_that_replays_its_step(run_stage: RunStage) -> None:
    watch = {"min_rank": 1000.0, "grace": 0, "patience": 5}
    with pytest.raises(StageFailed, match="collapsed: rank_image") as stopped:
        run_stage("a" * 24, {"steps": 9, "watch": watch, **ALONE})
    address = file_in(str(stopped.value))
    kept = replay.read(address)
    assert kept["step"] == 4
    again = replay.replay(kept)
    assert again["image_ids"] == kept["image_ids"]
    assert len(kept["image_ids"][0]) == 4
    assert again["bad_parameters"] == []
    assert again["culprit"] is None

    # The same step of a run that nobody stops.
    _, artifact = run_stage("b" * 24, {"steps": 9, "watch": {"min_rank": 0, "gradients_every": 1}, **ALONE})
    row = json.loads(artifact.read("curves.json"))[4]
    assert again["terms"]["align_image"] == pytest.approx(row["align_image"], rel=1e-6)
    assert again["grad_norms"]["align_image"] == pytest.approx(row["grad_norm/align_image"], rel=1e-5)


def test_a_learning_rate_of_1000_names_the_term_and_the_command(run_stage: RunStage) -> None:
    match = r"term align_image is (nan|inf) at step \d+ \(lower optimizer\.lr"
    with pytest.raises(StageFailed, match=match) as stopped:
        run_stage("0" * 24, {"steps": 200, "optimizer": {"lr": 1000.0}, **ALONE})
    found = replay.replay(replay.read(file_in(str(stopped.value))))
    assert not math.isfinite(found["terms"]["align_image"])


def test_the_command_prints_the_terms(run_stage: RunStage) -> None:
    watch = {"min_rank": 1000.0, "grace": 0, "patience": 1}
    with pytest.raises(StageFailed) as stopped:
        run_stage("c" * 24, {"steps": 3, "watch": watch, **ALONE})
    command = [sys.executable, "-m", "stages.pretrain.launch.replay", file_in(str(stopped.value))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[4])
    assert done.returncode == 0, done.stderr
    assert "rank_image" in done.stdout.splitlines()[0]
    assert re.search(r"align_image\s+\d\.\d+\s+weight 1\s+gradient norm \d", done.stdout)


def test_a_nan_is_traced_to_the_operation_that_made_it(run_stage: RunStage, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = Dino.compute_terms

    def poisoned(self: Dino, batch: Batch) -> dict[str, Tensor]:
        terms = sound(self, batch)
        # sqrt has no finite slope at 0, and 0 * inf is NaN: finite forwards, not backwards
        return terms | {"align_image": terms["align_image"] + (terms["align_image"] * 0).sqrt() * 0}

    monkeypatch.setattr(Dino, "compute_terms", poisoned)
    with pytest.raises(StageFailed, match="gradient's norm is nan while every term is finite at step 0") as stopped:
        run_stage("d" * 24, {"steps": 3, **ALONE})
    found = replay.replay(replay.read(file_in(str(stopped.value))))
    assert math.isfinite(found["terms"]["align_image"])
    assert any("blocks.0" in name for name in found["bad_parameters"])
    assert "SqrtBackward0" in found["culprit"]


@pytest.mark.slow
def test_two_ray_workers_leave_one_file_for_the_whole_batch(run_stage: RunStage, ray_local: None) -> None:
    watch = {"min_rank": 1000.0, "grace": 0, "patience": 2}
    settings = {"steps": 4, "watch": watch, "resources": {"workers": 2, "cpus": 0.5}}
    with pytest.raises(StageFailed, match="collapsed: rank_image") as stopped:
        run_stage("e" * 24, settings)
    kept = replay.read(file_in(str(stopped.value)))
    assert len(kept["image_ids"][0]) == 4
    again = replay.replay(kept)
    assert again["image_ids"] == kept["image_ids"]
    assert math.isfinite(again["terms"]["total"])


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactMissing, match=r"no replay file at .*nothing\.pt"):
        replay.read(str(tmp_path / "nothing.pt"))


def test_inputs_that_are_gone_are_named(run_stage: RunStage) -> None:
    with pytest.raises(StageFailed) as stopped:
        run_stage("f" * 24, {"steps": 2, "watch": {"min_rank": 1000.0, "grace": 0, "patience": 1}, **ALONE})
    kept = replay.read(file_in(str(stopped.value)))
    kept["inputs"] = {"images": (kept["inputs"]["images"][0], "images", "9" * 24)}
    with pytest.raises(ArtifactMissing, match=r"images/9{24} is not in .*run the stage that makes it"):
        replay.replay(kept)
    assert isinstance(kept["method"], dict)
    assert all(isinstance(value, torch.Tensor) for value in kept["method"].values())
