"""Images whose class is their colour, with masks; and a tiny random encoder as an artifact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.stage import Context, Outcome, Resources, Stage
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data.images import decode, encode_mask
from stages.data.rows import iter_rows
from stages.data.tables import SCHEMAS
from stages.models.encoder import Encoder
from stages.models.settings import Backbone
from tests.conftest import encode

COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]], np.uint8)
VOID = 3  # inside the range of the classes, as in CamVid


@pytest.fixture
def coloured(store: ArtifactStore) -> Artifact:
    """30 images of 48x40: the left three quarters in the colour of the label, the rest in any, void between."""
    rows = []
    for i in range(30):
        generator = np.random.default_rng(i)
        left, right = i % 3, (i // 3) % 3
        mask = np.full((40, 48), right, np.uint8)
        mask[:, :36] = left
        noise = generator.integers(-30, 30, (40, 48, 3))
        pixels = (COLOURS[mask].astype(int) + noise).clip(0, 255).astype(np.uint8)
        mask[:, 35:37] = VOID
        row: dict[str, Any] = dict.fromkeys(SCHEMAS["images"].names)
        row |= {
            "image_id": i,
            "key": f"{i:02d}.png",
            "width": 48,
            "height": 40,
            "image": encode(pixels, "PNG"),
            "mask": encode_mask(mask),
        }
        rows.append(row | {"split": "train" if i < 20 else "val", "label": str(left), "label_id": left, "sha256": ""})
    writer = store.begin("images", "coloured")
    for part in range(2):
        writer.put_table(part, pa.Table.from_pylist(rows[part * 15 :][:15], schema=SCHEMAS["images"]))
    names = ["red", "green", "blue"]
    return writer.commit(notes={"classes": names, "mask_classes": [*names, "void"], "ignore_index": VOID})


@pytest.fixture
def encoder(store: ArtifactStore) -> Artifact:
    torch.manual_seed(5)
    kwargs = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    tiny = Encoder.build(Backbone(name="vit_tiny_patch16_224", img_size=32, patch_size=8, kwargs=kwargs))
    writer = store.begin("encoder", "tiny")
    for file in tiny.save(writer.scratch):
        writer.put_file(file.name, file)
    return writer.commit()


@pytest.fixture
def features(store: ArtifactStore, coloured: Artifact) -> Artifact:
    """Of the coloured images: what a perfect encoder would give, the mean colour of each 8x8 patch."""
    rows = []
    for row in iter_rows(coloured, ["key", "image"]):
        pixels = decode(row["image"]).astype(np.float32) / 255 - 0.4
        cells = pixels.reshape(5, 8, 6, 8, 3).mean(axis=(1, 3))
        values = {"patches": cells.ravel().astype(np.float16), "vector": cells.mean(axis=(0, 1)).astype(np.float16)}
        rows.append({"image_id": row["image_id"], "key": row["key"], "grid_height": 5, "grid_width": 6, **values})
    writer = store.begin("features", "colours")
    for part in range(2):
        writer.put_table(part, pa.Table.from_pylist(rows[part * 15 :][:15], schema=SCHEMAS["features"]))
    return writer.commit(inputs={"images": f"images/{coloured.fingerprint}"}, notes={"width": 3, "vector_width": 3})


RunStage = Callable[..., tuple[Outcome, Artifact]]


@pytest.fixture
def run(store: ArtifactStore, coloured: Artifact, encoder: Artifact) -> RunStage:
    """`run(StageType, key=value, ...)` on the coloured images; `images=` and `fingerprint=` name others."""

    def go(
        stage: type[Stage[Any]], *, fingerprint: str = "m1", images: Artifact | None = None, **settings: Any
    ) -> tuple[Outcome, Artifact]:
        config = stage.Config.model_validate({"images": "images", "encoder": "encoder", **settings})
        writer = store.begin("metrics", fingerprint)
        inputs = {"images": images or coloured, "encoder": encoder}
        outcome = stage(config).run(Context("eval", fingerprint, inputs, writer, Resources()))
        return outcome, writer.commit(metrics=outcome.metrics, preview=outcome.preview)

    return go


@pytest.fixture
def run_frozen(store: ArtifactStore, coloured: Artifact, features: Artifact) -> RunStage:
    """`run_frozen(StageType, key=value, ...)` on the features of the coloured images, or on those `given`."""

    def go(
        stage: type[Stage[Any]],
        *,
        fingerprint: str = "m1",
        images: Artifact | None = None,
        given: Artifact | None = None,
        **settings: Any,
    ) -> tuple[Outcome, Artifact]:
        config = stage.Config.model_validate({"images": "images", "features": "features", **settings})
        writer = store.begin("metrics", fingerprint)
        inputs = {"images": images or coloured, "features": given or features}
        outcome = stage(config).run(Context("eval", fingerprint, inputs, writer, Resources()))
        return outcome, writer.commit(metrics=outcome.metrics, preview=outcome.preview)

    return go
