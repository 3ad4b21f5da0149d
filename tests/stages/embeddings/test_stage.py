"""The embeddings stage on Ray: unit vectors that the encoder itself gives, bad images, both ways to name a model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipeline.stage import Context
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data.images import decode
from stages.data.tables import Table
from stages.embeddings.settings import EmbeddingsConfig
from stages.embeddings.stage import Embeddings
from stages.models.encoder import Encoder
from stages.models.inference import Inference, centre_square
from stages.models.settings import Backbone
from tests.conftest import encode, smooth_pixels

BACKBONE = Backbone(
    name="vit_tiny_patch16_224", img_size=32, patch_size=8, kwargs={"embed_dim": 24, "depth": 1, "num_heads": 2}
)


@pytest.mark.slow
def test_vectors_of_an_encoder_and_of_a_backbone(
    ray_local: None, store: ArtifactStore, images: Callable[..., Artifact], context: Callable[..., Context]
) -> None:
    files = {f"{i:02d}.jpg": encode(smooth_pixels(60 + i, 40, i)) for i in range(14)}
    source = images({**files, "05.jpg": b"no image"}, [9, 5])
    torch.manual_seed(7)
    encoder = Encoder.build(BACKBONE)
    writer = store.begin("encoder", "e1")
    for file in encoder.save(writer.scratch):
        writer.put_file(file.name, file)
    inputs = {"images": source, "encoder": writer.commit()}
    sizes = {"images": "images", "resize": 36, "crop": 32}

    ctx = context("embeddings", **inputs)
    outcome = Embeddings(EmbeddingsConfig.model_validate({**sizes, "encoder": "warmup"})).run(ctx)
    made = ctx.output.commit()
    assert outcome.counts == {"images": 13, "failed": 1}
    assert [problem["key"] for problem in outcome.problems] == ["05.jpg"]
    table = Table.open(made)
    vectors = table.column("embedding")
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert table.ids.tolist() == [i for i in range(14) if i != 5]
    alone = Inference(encoder).pooled([centre_square(decode(files["03.jpg"]), 36, 32)], "cls")[0]
    np.testing.assert_allclose(table.row(3)["embedding"], alone.numpy(), atol=1e-6)
    assert made.read("preview.png").startswith(b"\x89PNG")

    # A backbone with random weights: the seed says which.
    ctx = context("embeddings", "f2", images=source)
    settings = {**sizes, "backbone": BACKBONE.model_dump(), "pooling": "mean", "seed": 7}
    Embeddings(EmbeddingsConfig.model_validate(settings)).run(ctx)
    pooled = Inference(encoder).pooled([centre_square(decode(files["03.jpg"]), 36, 32)], "mean")[0]
    np.testing.assert_allclose(Table.open(ctx.output.commit()).row(3)["embedding"], pooled.numpy(), atol=1e-6)


@pytest.mark.parametrize("given", [{}, {"encoder": "warmup", "backbone": {"name": "resnet18"}}])
def test_exactly_one_model(given: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="exactly one of encoder and backbone"):
        EmbeddingsConfig.model_validate({"images": "images", **given})


def test_the_driver_imports_no_torch() -> None:
    code = "import sys, stages.embeddings.embedder; assert not {'torch', 'timm', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_centre_square_is_the_middle_of_the_image() -> None:
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 40:] = 255
    square = centre_square(pixels, 20, 16)
    assert square.shape == (16, 16, 3)
    assert (square[:, :7] < 10).all()
    assert (square[:, 9:] > 245).all()
    assert centre_square(smooth_pixels(5, 9), 32, 32).shape == (32, 32, 3), "small images grow"
