"""Nearest neighbours: exact against brute force, ties by id, never the image itself, recall, the stage's files."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.errors import SourceError
from pipeline.stage import Context, Feed, Resources, StageConfig
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data.images import decode
from stages.data.tables import SCHEMAS, Table
from stages.neighbors.nearest import IndexSettings, Neighbourhood, recall
from stages.neighbors.stage import Neighbors, NeighborsConfig
from tests.conftest import encode, smooth_pixels


def unit(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def brute_force(vectors: NDArray[np.float32], ids: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """All pairs, one query at a time, sorted by (similarity, id)."""
    rows = []
    for i, query in enumerate(vectors):
        similarity = (vectors.astype(np.float64) * query.astype(np.float64)).sum(axis=1).astype(np.float32)
        order = sorted((j for j in range(len(ids)) if j != i), key=lambda j: (-similarity[j], ids[j]))
        rows.append(ids[order[:k]])
    return np.array(rows)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(3, 60), st.integers(1, 8), st.booleans())
def test_flat_equals_brute_force_also_where_vectors_repeat(seed: int, count: int, k: int, repeats: bool) -> None:
    generator = np.random.default_rng(seed)
    vectors = unit(generator.normal(size=(count, 5)))
    if repeats:  # groups of equal vectors larger than k: the cut goes through a tie
        vectors = vectors[generator.integers(0, 3, count)]
    ids = np.sort(generator.choice(1000, count, replace=False)).astype(np.int64)
    k = min(k, count - 1)
    found, similarities = Neighbourhood(vectors, ids, IndexSettings()).search(np.arange(count), k)
    np.testing.assert_array_equal(found, brute_force(vectors, ids, k))
    assert (np.diff(similarities, axis=1) <= 0).all()


def test_a_thousand_equal_vectors_are_in_the_order_of_their_ids() -> None:
    vectors = unit(np.ones((1500, 4)))
    found, _ = Neighbourhood(vectors, np.arange(1500), IndexSettings()).search(np.array([0, 700]), 3)
    assert found.tolist() == [[1, 2, 3], [0, 1, 2]]


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_approximate_indexes_are_repeatable_and_their_recall_is_measured(index: str) -> None:
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(20, 16)) * 2
    vectors = unit(centres[generator.integers(0, 20, 2000)] + generator.normal(size=(2000, 16)))
    settings = IndexSettings(index, nlist=40, nprobe=2, m=8, ef_construction=20, ef_search=12)
    first, second = (Neighbourhood(vectors, np.arange(2000), settings) for _ in range(2))
    rows = np.arange(0, 2000, 13)
    np.testing.assert_array_equal(first.search(rows, 10)[0], second.search(rows, 10)[0])
    measured = recall(first, 10, sample=300)
    assert 0.5 < measured < 1.0, "a weak index must not look exact"
    thorough = IndexSettings(index, nlist=40, nprobe=40, m=32, ef_construction=200, ef_search=400)
    assert recall(Neighbourhood(vectors, np.arange(2000), thorough), 10, sample=300) > max(0.98, measured)


def test_a_cell_with_too_few_vectors_is_completed() -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(200, 8)))
    index = Neighbourhood(vectors, np.arange(200), IndexSettings("ivf", nlist=5, nprobe=1))
    found, similarities = index.search(np.arange(200), 150)
    assert (found >= 0).all()
    assert np.isfinite(similarities).all()
    assert all(len(set(row)) == 150 and i not in row for i, row in enumerate(found.tolist()))


# -- the stage ---------------------------------------------------------------------------------------------


@pytest.fixture
def embeddings(store: ArtifactStore, images: Callable[..., Artifact]) -> Artifact:
    """Twelve photographs and their embeddings in shards of 5, 0 and 7, made from `images` in the same store."""
    source = images({f"{i:02d}.jpg": encode(smooth_pixels(40, 30, i)) for i in range(12)}, [5, 7])
    vectors = unit(np.random.default_rng(1).normal(size=(12, 6)))
    writer = store.begin("embeddings", "e1")
    for shard, ids in enumerate((range(5), range(0), range(5, 12))):
        rows = [{"image_id": i, "embedding": vectors[i]} for i in ids]
        writer.put_table(shard, pa.Table.from_pylist(rows, schema=SCHEMAS["embeddings"]))
    return writer.commit(inputs={"images": source.name})


def run(store: ArtifactStore, embeddings: Artifact, **config: object) -> tuple[object, Artifact]:
    writer = store.begin("neighbors", "n1")
    stage = Neighbors(NeighborsConfig.model_validate({"embeddings": "embeddings", **config}))
    outcome = stage.run(Context("near", "n1", {"embeddings": embeddings}, writer, Resources()))
    return outcome, writer.commit(notes=outcome.notes, preview=outcome.preview)


def test_the_table_and_the_picture(store: ArtifactStore, embeddings: Artifact) -> None:
    outcome, made = run(store, embeddings, k=4)
    vectors = Table.open(embeddings).column("embedding")
    table = Table.open(made)
    np.testing.assert_array_equal(table.column("neighbors"), brute_force(vectors, np.arange(12), 4))
    assert table.schema.field("similarities").type == pa.list_(pa.float32())
    assert [entry.rows for entry in made.shards()] == [5, 0, 7]
    assert made.read("preview.png").startswith(b"\x89PNG")
    assert outcome.notes["k"] == 4


def test_shards_that_are_there_are_not_computed_again(store: ArtifactStore, embeddings: Artifact) -> None:
    writer = store.begin("neighbors", "n1")
    row = {"image_id": 0, "neighbors": [7], "similarities": [0.5]}
    writer.put_table(0, pa.Table.from_pylist([row], schema=SCHEMAS["neighbors"]))
    writer.close()
    _, made = run(store, embeddings, k=1)
    assert Table.open(made).row(0)["neighbors"].tolist() == [7], "the finished shard stays as it was"


def test_only_the_embeddings_are_read(store: ArtifactStore, embeddings: Artifact) -> None:
    """The images behind them may be gone from the store: neither the table nor the picture needs them."""
    store.discard("images", embeddings.manifest.inputs["images"].split("/")[1])
    outcome, made = run(store, embeddings, k=2)
    assert outcome.preview == "preview.png"
    assert decode(made.read("preview.png")).shape[2] == 3
    assert made.rows == 12
    assert made.manifest.notes["images"] == embeddings.manifest.inputs["images"], "training checks the image set"


def test_two_images_are_each_others_neighbours(store: ArtifactStore, images: Callable[..., Artifact]) -> None:
    writer = store.begin("embeddings", "e2")
    rows = [{"image_id": i, "embedding": [1.0, float(i)]} for i in range(2)]
    writer.put_table(0, pa.Table.from_pylist(rows, schema=SCHEMAS["embeddings"]))
    _, made = run(store, writer.commit(), k=1)
    assert Table.open(made).column("neighbors").tolist() == [[1], [0]]


def test_more_neighbours_than_images_is_an_error_with_the_numbers(store: ArtifactStore, embeddings: Artifact) -> None:
    with pytest.raises(
        SourceError, match=r"k is 12, but each of the 12 images has only 11 others: set it to 11 or less"
    ):
        run(store, embeddings, k=12)


def test_recall_of_an_approximate_index_is_in_the_manifest(store: ArtifactStore, embeddings: Artifact) -> None:
    outcome, made = run(store, embeddings, k=3, index="hnsw", recall_sample=5)
    assert made.manifest.notes["recall"] == outcome.metrics["recall"] == 1.0
    assert made.manifest.notes["recall_sample"] == 5


def test_more_neighbours_than_images_are_found_when_the_images_are_counted() -> None:
    stage = Neighbors(NeighborsConfig(embeddings="e", k=10))
    settings = StageConfig()

    def asked(images: int | None) -> list[tuple[str, str, str]]:
        counts = None if images is None else {"images": images}
        feed = Feed("e", "embeddings", "f", {"images": Feed("photos", "images", "f", {}, settings, counts)}, settings)
        return list(stage.mismatches({"embeddings": feed}))

    assert asked(None) == asked(11) == []
    ((path, what, remedy),) = asked(10)
    assert (path, remedy) == ("k", "set it to 9 or less, or add images")
    assert what == "k is 10, but each of the 10 images of photos has 9 others"
