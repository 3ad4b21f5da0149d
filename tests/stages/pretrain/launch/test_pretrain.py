"""Whole training runs: in the driver's process, on Ray Train workers, and with workers killed on the way."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Mapping

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import ClusterError, UsageError
from pipeline.stage import Context, Outcome
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.models.encoder import Encoder
from stages.pretrain.config.pretrain import PretrainConfig
from stages.pretrain.launch.pretrain import pretrain
from stages.training.launch import alone
from tests.stages.pretrain.conftest import SMALL, RunStage, write_photographs

ALONE = {"resources": {"workers": 0}}
TERMS = ("align_image", "total", "grad_norm", "lr")


def curve(artifact: Artifact) -> list[list[float]]:
    return [[row["step"], *(row[name] for name in TERMS)] for row in json.loads(artifact.read("curves.json"))]


def test_the_artifact_holds_encoder_curves_and_picture(run_stage: RunStage) -> None:
    rows: list[int] = []
    outcome, artifact = run_stage("a" * 24, {"steps": 6, **ALONE}, lambda metrics, step: rows.append(step))
    assert rows == [1, 2, 3, 4, 5, 6]
    assert {"encoder.safetensors", "encoder.json", "curves.parquet", "preview.png", "views.png"} <= {
        entry.name for entry in artifact.manifest.files
    }
    assert outcome.metrics["total"] == pytest.approx(curve(artifact)[-1][2])
    encoder = Encoder.load(artifact)
    assert encoder(torch.zeros(1, 3, 32, 32)).map.shape == (1, 32, 4, 4)


@pytest.mark.parametrize(
    ("gpus", "there", "device"), [(None, True, "cuda"), (0, True, "cpu"), (1, True, "cuda"), (None, False, "cpu")]
)
def test_gpus_0_keeps_a_training_off_the_gpu(
    gpus: float | None, there: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    settings = {
        "images": "i",
        "init": "e",
        "method": {"name": "dino"},
        "steps": 1,
        "resources": {"workers": 0, "gpus": gpus},
    }
    assert alone.device_of(PretrainConfig.model_validate(settings)) == device


def test_progress_shows_loss_learning_rate_and_speed(run_stage: RunStage) -> None:
    shown: list[str] = []
    _, artifact = run_stage("a" * 24, {"steps": 2, **ALONE}, show=shown.append)
    rows = json.loads(artifact.read("curves.json"))
    assert shown == [f"loss {row['total']:.4g}, lr {row['lr']:.2e}, {row['images_per_s']:.0f} images/s" for row in rows]


def test_unreadable_images_are_named_in_the_artifact(run_stage: RunStage, store: ArtifactStore) -> None:
    damaged = write_photographs(store, "1" * 24, unreadable=[3, 17])
    outcome, _ = run_stage("a" * 24, {"epochs": 2, **ALONE}, trained_on=damaged)
    assert {problem["key"] for problem in outcome.problems} == {"003.jpg", "017.jpg"}
    assert all(problem["reason"] for problem in outcome.problems)
    assert outcome.counts["skipped: unreadable image"] >= 4  # each is met again in the second epoch


def test_a_run_says_what_the_passes_of_a_step_do_not_see(
    store: ArtifactStore, images: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alone, "train_alone", lambda *given: Outcome())

    def said(**changes: object) -> list[str]:
        lines: list[str] = []
        config = PretrainConfig.model_validate({**SMALL, "steps": 1, **ALONE, **changes})
        context = Context("warmup", "a" * 24, {"images": images}, store.begin("encoder", "a" * 24), config.resources)
        context.say = lines.append
        pretrain(config, context)
        return lines

    assert said() == []
    (line,) = said(accumulate=2, method={"name": "simclr"})
    assert line.startswith("warmup: accumulate: 2 makes forward passes of 2 images. Computed over one pass")
    assert "not over the batch of 4: negatives, and batch norms where the networks have any" in line
    (line,) = said(accumulate=2)
    assert "not over the batch of 4: and" not in line
    assert "batch of 4: batch norms" in line


@pytest.mark.slow
def test_ray_train_gives_the_terms_of_a_plain_process(run_stage: RunStage, ray_local: None) -> None:
    _, alone = run_stage("b" * 24, {"steps": 4, **ALONE})
    _, on_ray = run_stage("c" * 24, {"steps": 4, "resources": {"workers": 1, "cpus": 1}})
    torch.testing.assert_close(torch.tensor(curve(on_ray)), torch.tensor(curve(alone)), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_killed_training_worker_changes_nothing(run_stage: RunStage, ray_local: None) -> None:
    settings = {"steps": 16, "checkpoint_every": 4, "resources": {"workers": 2, "cpus": 0.5}}
    _, whole = run_stage("d" * 24, settings)
    killed: list[int] = []

    def kill_once(metrics: Mapping[str, float], step: int) -> None:
        if step >= 6 and not killed:
            worker = next(iter(train_workers()))
            killed.append(worker.pid)
            os.kill(worker.pid, signal.SIGKILL)

    _, cut = run_stage("e" * 24, settings, kill_once)
    assert killed
    assert curve(cut) == curve(whole)
    for name, value in load_file(whole.local("encoder.safetensors")).items():
        assert torch.equal(value, load_file(cut.local("encoder.safetensors"))[name]), name


@pytest.mark.slow
def test_more_cpus_than_the_cluster_has_are_refused(run_stage: RunStage, ray_local: None) -> None:
    with pytest.raises(ClusterError, match=r"2 workers with 64 CPUs each need 128, the cluster has"):
        run_stage("f" * 24, {"steps": 1, "resources": {"workers": 2, "cpus": 64}})


@pytest.mark.slow
def test_a_batch_that_the_workers_cannot_share_is_refused_before_they_start(
    run_stage: RunStage, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = "ray.train.v2.api.data_parallel_trainer.DataParallelTrainer"
    monkeypatch.setattr(f"{trainer}.fit", lambda self: pytest.fail("Ray Train was started"))
    with pytest.raises(UsageError, match="4 images, which 3 workers cannot share equally"):
        run_stage("f" * 24, {"steps": 1, "resources": {"workers": 3}})


def train_workers() -> list[psutil.Process]:
    """Ray Train's worker processes that belong to this test process's own Ray."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if "TrainWorker" in " ".join(child.cmdline()[:1]):
                found.append(child)
    return found
