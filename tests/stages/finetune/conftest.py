"""Photographs of one coloured square on grey, with label, mask and box; a tiny random encoder; stages run on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.stage import Context, Outcome, Stage
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data.images import encode_mask
from stages.data.tables import SCHEMAS
from stages.models.encoder import Encoder
from stages.models.settings import Backbone
from tests.conftest import encode

COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]], np.uint8)
NAMES = ["red", "green", "blue"]
WIDTH, HEIGHT = 56, 48
ALONE = {"resources": {"workers": 0}}


def square(i: int) -> tuple[int, int, int, int]:
    """Where the square of image i lies."""
    generator = np.random.default_rng(1000 + i)
    side = int(generator.integers(20, 30))
    x, y = int(generator.integers(0, WIDTH - side)), int(generator.integers(0, HEIGHT - side))
    return x, y, x + side, y + side


def write_squares(store: ArtifactStore, fingerprint: str, unreadable: tuple[int, ...] = ()) -> Artifact:
    """36 images of 56x48, 24 of them to learn from; those in `unreadable` are cut short."""
    rows = []
    for i in range(36):
        generator = np.random.default_rng(i)
        x0, y0, x1, y1 = square(i)
        pixels = np.full((HEIGHT, WIDTH, 3), 110) + generator.integers(-20, 20, (HEIGHT, WIDTH, 3))
        pixels[y0:y1, x0:x1] = COLOURS[i % 3] + generator.integers(-20, 20, (y1 - y0, x1 - x0, 3))
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[y0:y1, x0:x1] = 1 + i % 3
        mask[:, -1] = 255
        shape = [[x0, y0, x1, y0, x1, y1, x0, y1]]
        row: dict[str, Any] = dict.fromkeys(SCHEMAS["images"].names)
        row |= {"image_id": i, "key": f"{i:02d}.png", "width": WIDTH, "height": HEIGHT, "sha256": ""}
        row |= {"image": encode(pixels.clip(0, 255).astype(np.uint8), "PNG")[: 150 if i in unreadable else None]}
        row |= {"split": "train" if i < 24 else "val", "label": NAMES[i % 3], "label_id": i % 3}
        row["mask"] = encode_mask(mask)
        row["objects"] = [
            {
                "box": [x0, y0, x1, y1],
                "category": NAMES[i % 3],
                "category_id": i % 3,
                "crowd": False,
                "mask": json.dumps(shape).encode(),
            }
        ]
        rows.append(row)
    writer = store.begin("images", fingerprint)
    for shard in range(2):
        writer.put_table(shard, pa.Table.from_pylist(rows[shard * 18 :][:18], schema=SCHEMAS["images"]))
    return writer.commit(notes={"classes": NAMES, "mask_classes": ["ground", *NAMES], "ignore_index": 255})


@pytest.fixture
def squares(store: ArtifactStore) -> Artifact:
    return write_squares(store, "5" * 24)


def write_encoder(store: ArtifactStore, fingerprint: str, **backbone: Any) -> Artifact:
    """A random encoder."""
    torch.manual_seed(5)
    made = Encoder.build(Backbone.model_validate(backbone))
    writer = store.begin("encoder", fingerprint)
    for file in made.save(writer.scratch):
        writer.put_file(file.name, file)
    return writer.commit()


@pytest.fixture
def vit(store: ArtifactStore) -> Artifact:
    """Two blocks, patches of 8 pixels."""
    kwargs = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    return write_encoder(store, "a1" * 12, name="vit_tiny_patch16_224", img_size=32, patch_size=8, kwargs=kwargs)


@pytest.fixture
def resnet(store: ArtifactStore) -> Artifact:
    """A ResNet-10 of a quarter of the width."""
    kwargs = {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32], "stem_width": 8}
    return write_encoder(store, "a2" * 12, name="resnet18", kwargs=kwargs)


@pytest.fixture
def mobilenet(store: ArtifactStore) -> Artifact:
    """A network that is neither a ResNet nor a ViT, and has maps at five strides."""
    return write_encoder(store, "a4" * 12, name="mobilenetv3_small_050", kwargs={})


Tune = Callable[..., tuple[Outcome, Artifact]]


@pytest.fixture
def tune(store: ArtifactStore, squares: Artifact, vit: Artifact) -> Tune:
    """`tune(StageType, fingerprint, {"steps": 4, ...}, on_row=..., encoder=...)` runs a stage and commits it."""

    def run(
        stage: type[Stage[Any]],
        fingerprint: str,
        settings: Mapping[str, Any],
        *,
        images: Artifact | None = None,
        encoder: Artifact | None = None,
        on_row: Callable[[Mapping[str, float], int], None] = lambda metrics, step: None,
    ) -> tuple[Outcome, Artifact]:
        common = {"images": "images", "encoder": "encoder", "batch_size": 6, "log_every": 1, "loader_workers": 0}
        config = stage.Config.model_validate({**common, **settings})
        output = store.begin("encoder", fingerprint)
        inputs = {"images": images or squares, "encoder": encoder or vit}
        context = Context("tuned", fingerprint, inputs, output, config.resources, log_metrics=on_row)
        outcome = stage(config).run(context)
        return outcome, output.commit(
            stage="tuned", metrics=outcome.metrics, counts=outcome.counts, notes=outcome.notes, preview=outcome.preview
        )

    return run


def curve(artifact: Artifact) -> list[tuple[float, float, float]]:
    """Step, loss and gradient norm of every row of an artifact's curves."""
    return [(row["step"], row["total"], row["grad_norm"]) for row in json.loads(artifact.read("curves.json"))]
