"""Weights that cannot be had are found before a run has started anything, with the remedy."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from pipeline.errors import SourceError
from stages.models import weights
from stages.models.encoder import Encoder
from stages.models.settings import Backbone
from stages.pretrain.config.pretrain import PretrainConfig

PRETRAINED = Backbone(name="resnet10t", pretrained=True)


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> socket.socket:
    """A hub that takes connections and never answers, and an empty cache."""
    server = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(weights, "ANSWER_SECONDS", 0.2)
    yield server
    server.close()


def test_weights_that_cannot_be_downloaded(silent: socket.socket) -> None:
    start = time.monotonic()
    ((path, what, remedy),) = weights.obstacles(PRETRAINED, print)
    assert time.monotonic() - start < 5
    assert path == "pretrained"
    assert what.startswith("the weights of resnet10t are not in ")
    assert what.endswith("and 127.0.0.1 does not answer")
    assert "download model.safetensors of 127.0.0.1/timm/resnet10t" in remedy
    assert "name its path with checkpoint:" in remedy


def test_weights_in_the_cache_need_no_network(silent: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, file: f"/cache/{repo}/{file}")
    assert list(weights.obstacles(PRETRAINED, print)) == []


def test_a_hub_that_answers_is_enough(silent: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_answers", lambda endpoint: True)
    assert list(weights.obstacles(PRETRAINED, print)) == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    ((_, what, _),) = weights.obstacles(PRETRAINED, print)
    assert "HF_HUB_OFFLINE forbids" in what


def test_a_download_that_fails_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(*arguments: object, **options: object) -> None:
        raise OSError("a page\nof explanation")

    monkeypatch.setattr("timm.create_model", create_model)
    with pytest.raises(
        SourceError, match=r"^backbone\.pretrained: the weights of resnet10t cannot be had: OSError: a page \("
    ):
        Encoder.build(PRETRAINED)


def test_every_backbone_is_looked_at_and_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    state = Encoder.build(Backbone(name="resnet10t")).model.state_dict()
    torch.save({key: value for key, value in state.items() if not key.startswith("layer4")}, tmp_path / "part.pth")
    torch.save({"x": torch.zeros(2)}, tmp_path / "none.pth")
    config = PretrainConfig.model_validate(
        {
            "images": "i",
            "steps": 1,
            "backbone": {"name": "resnet10t", "checkpoint": str(tmp_path / "part.pth")},
            "method": {
                "name": "dsa",
                "host": {"name": "simclr"},
                "auxiliary": {"name": "resnet10t", "checkpoint": str(tmp_path / "none.pth")},
            },
        }
    )
    said: list[str] = []
    ((path, what, _),) = weights.obstacles(config, said.append)
    assert path == "method.auxiliary.checkpoint"
    assert "none of its 1 tensors fits ResNet" in what
    assert any("not in the file, left random: layer4" in line for line in said), said
