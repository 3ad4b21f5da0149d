"""DSA through the pre-train stage: cached embeddings find their images, host and regulariser share one run."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.errors import UsageError
from pipeline.stage import Context, edges
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data.tables import SCHEMAS
from stages.pretrain.launch.assemble import assemble
from stages.pretrain.stage import Pretrain, PretrainConfig
from stages.pretrain.views.geometry import apply
from tests.stages.pretrain.conftest import SMALL

HOST = {"name": "moco", "size": 32, "queue": 10, "projector": {"hidden": 16, "out": 8}}
DSA = {"name": "dsa", "host": HOST, "embeddings": "clip", "hidden": 8, "eta": 3}


def embeddings(store: ArtifactStore, of: str) -> Artifact:
    writer = store.begin("embeddings", "e" * 23 + of[-1])
    vectors = np.random.default_rng(0).normal(size=(24, 6)).astype(np.float32)
    rows = [{"image_id": i, "embedding": vectors[i].tolist()} for i in range(24)]
    writer.put_table(0, pa.Table.from_pylist(rows, schema=SCHEMAS["embeddings"]))
    return writer.commit(inputs={"images": of})


def config(**changes: object) -> PretrainConfig:
    return PretrainConfig.model_validate({**SMALL, "method": DSA, "steps": 4, "resources": {"workers": 0}, **changes})


def test_edges_of_host_and_regulariser_are_found() -> None:
    dense = {"name": "cotap", "neighbors": "knn"}
    found = {edge.path: edge.stage for edge in edges(config(method={**DSA, "host": dense}))}
    assert found == {"images": "images", "method.host.neighbors": "knn", "method.embeddings": "clip"}
    several = edges(config(method={**DSA, "embeddings": ["clip_a", "clip_b"]}))
    assert {edge.path: edge.stage for edge in several if "method" in edge.path} == {
        "method.embeddings.0": "clip_a",
        "method.embeddings.1": "clip_b",
    }


def test_embeddings_reach_the_rows_of_a_batch(store: ArtifactStore, images: Artifact) -> None:
    table = embeddings(store, f"{images.kind}/{images.fingerprint}")
    run = assemble(config(), {"images": images, "method.embeddings": table})
    (batch,) = run.data.batches(0, 1)
    vectors = np.random.default_rng(0).normal(size=(24, 6)).astype(np.float32)
    np.testing.assert_array_equal(batch.extras["embedding"].numpy(), vectors[batch.image_ids.numpy()])
    assert run.weights == {"moco": 1.0, "dsa_am": 0.1, "dsa_con": 100.0}


def test_the_released_variant_gets_the_whole_images(images: Artifact) -> None:
    auxiliary = {"name": "vit_tiny_patch16_224", "img_size": 24, "patch_size": 8}
    auxiliary |= {"kwargs": {"embed_dim": 16, "depth": 1, "num_heads": 2}}
    method = {"name": "dsa", "variant": "released", "host": HOST, "auxiliary": auxiliary, "eta": 3}
    run = assemble(config(method=method), {"images": images})
    (batch,) = run.data.batches(0, 1)
    assert batch.views["original"].shape == (1, 4, 3, 24, 24)
    corners = torch.tensor([[0.0, 0.0], [24.0, 24.0]]).expand(4, -1, -1)
    torch.testing.assert_close(apply(batch.affines["original"][0], corners)[:, 1], torch.tensor([[48.0, 40.0]] * 4))
    terms = run.method.compute_terms(batch)
    assert list(terms) == list(run.weights) == ["moco", "dsa_released_arrange", "dsa_released_constraint"]
    assert all(torch.isfinite(term) for term in terms.values())


def test_embeddings_of_other_images_are_refused(store: ArtifactStore, images: Artifact) -> None:
    table = embeddings(store, "images/" + "9" * 24)
    with pytest.raises(UsageError, match="give the method a `embeddings` stage made from those images"):
        assemble(config(), {"images": images, "method.embeddings": table})


def test_the_stage_trains_host_and_regulariser_together(store: ArtifactStore, images: Artifact) -> None:
    inputs = {"images": images, "method.embeddings": embeddings(store, f"{images.kind}/{images.fingerprint}")}
    settings, output = config(), store.begin("encoder", "d" * 24)
    rows: list[dict[str, float]] = []
    context = Context(
        "train", "d" * 24, inputs, output, settings.resources, log_metrics=lambda row, step: rows.append(dict(row))
    )
    outcome = Pretrain(settings).run(context)
    assert {"moco", "dsa_am", "dsa_con", "total"} <= set(outcome.metrics)
    for row in rows:
        assert row["total"] == pytest.approx(row["moco"] + 0.1 * row["dsa_am"] + 100 * row["dsa_con"], rel=1e-5)
        assert 0 <= row["dsa_score"] <= 1
    assert len(rows) == 4
