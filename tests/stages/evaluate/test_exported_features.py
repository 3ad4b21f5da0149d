"""What `segment_linear` saw of an encoder with a filter, every patch of it, is what the exported encoder gives."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.cli.export import copy_out
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.evaluate.segment_linear import SegmentLinear
from stages.models.encoder import Encoder
from stages.models.feature_extractor import ObjectAwareFilter
from stages.models.inference import Inference
from stages.models.settings import Backbone
from tests.stages.models.alone import Lines, run_alone

from .conftest import RunStage


@pytest.fixture
def encoder(store: ArtifactStore) -> Artifact:
    """A ViT with an object-aware filter, as CoTAP trains it."""
    kwargs = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    tiny = Encoder.build(Backbone(name="vit_tiny_patch16_224", img_size=32, patch_size=8, kwargs=kwargs))
    tiny.filter = ObjectAwareFilter(24, prototypes=4, heads=2)
    writer = store.begin("encoder", "filtered")
    for file in tiny.save(writer.scratch, method="cotap"):
        writer.put_file(file.name, file)
    return writer.commit(uses="pretrain", stage="cotap")


def test_segment_linear_saw_what_the_export_gives(
    run: RunStage, encoder: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    call = Inference.__call__

    def watched(self: Inference, pixels: list[np.ndarray]):
        features = call(self, pixels)
        seen.append((torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255, *features))
        return features

    monkeypatch.setattr(Inference, "__call__", watched)
    run(SegmentLinear, train_size=32, test_size=64, label_size=8, samples=40, random_baseline=False)
    copy_out(encoder, tmp_path / "encoder")
    (snippet,) = re.findall(r"```python\n(.*?)```", (tmp_path / "encoder/README.md").read_text(), flags=re.S)
    images = [images for images, *_ in seen]
    assert {tuple(batch.shape[2:]) for batch in images} == {(32, 32), (64, 64)}
    alone = run_alone({"cotap": Lines(tmp_path / "encoder", snippet, images)}, tmp_path)["cotap"]
    assert alone["numbers"]["width"] == 48
    for (_, vector, map_BDhw), (_, theirs, their_map) in zip(seen, alone["features"][1:], strict=True):
        torch.testing.assert_close(their_map, map_BDhw, atol=1e-5, rtol=0)
        torch.testing.assert_close(theirs, vector, atol=1e-5, rtol=0)
