"""Encoders that no stage has trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pipeline.errors import UsageError
from pipeline.stage import Context
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.encoders.stage import EncoderConfig, UntrainedEncoder
from stages.models.encoder import Encoder

TINY = {"embed_dim": 24, "depth": 1, "num_heads": 2}
BACKBONE = {"name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, "kwargs": TINY}


def made(
    store: ArtifactStore, fingerprint: str, inputs: dict[str, Artifact] | None = None, **settings: Any
) -> Artifact:
    stage = UntrainedEncoder(EncoderConfig.model_validate(settings))
    output = store.begin("encoder", fingerprint)
    outcome = stage.run(Context("net", fingerprint, inputs or {}, output, stage.config.resources))
    return output.commit(counts=outcome.counts, notes=outcome.notes)


def features(artifact: Artifact) -> torch.Tensor:
    return Encoder.load(artifact).eval()(torch.ones(1, 3, 32, 32)).map.detach()


def test_random_weights_are_those_of_their_seed(store: ArtifactStore) -> None:
    one, again, other = (
        made(store, name, backbone=BACKBONE, seed=seed) for name, seed in zip("abc", (0, 0, 1), strict=True)
    )
    assert torch.equal(features(one), features(again))
    assert not torch.equal(features(one), features(other))
    assert one.manifest.notes == {"width": 24, "vector_width": 24}


def test_like_gives_the_shape_and_none_of_the_weights(store: ArtifactStore) -> None:
    trained = made(store, "a", backbone=BACKBONE)
    twin = made(store, "b", {"like": trained}, like="a", seed=3)
    assert features(twin).shape == features(trained).shape
    assert not torch.equal(features(twin), features(trained))


def test_one_origin_exactly() -> None:
    for settings in ({}, {"backbone": BACKBONE, "like": "a"}):
        with pytest.raises(ValidationError, match="give exactly one of the two"):
            EncoderConfig.model_validate(settings)


def test_a_backbone_that_cannot_be_built_is_named(store: ArtifactStore) -> None:
    with pytest.raises(UsageError, match=r"stages\.net: backbone\.kwargs: "):
        made(store, "a", backbone={**BACKBONE, "kwargs": {"no_such_option": 1}})
