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
from stages.neighbors import blocks, on_ray
from stages.neighbors.blocks import group
from stages.neighbors.search import Block, Index, IndexSettings, nearest, train_cells
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


def search(
    vectors: NDArray[np.float32], ids: NDArray[np.int64], k: int, size: int, settings: IndexSettings | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The neighbours of all, from database blocks of `size` vectors."""
    settings = settings or IndexSettings()
    centres = train_cells(vectors, settings, len(ids), 0) if settings.index == "ivf" else None
    database = [Block(ids[at : at + size], vectors[at : at + size]) for at in range(0, len(ids), size)]
    return nearest(Index(settings, len(ids), centres=centres), Block(ids, vectors), database, k)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(3, 60), st.integers(1, 8), st.booleans(), st.integers(1, 60))
def test_flat_equals_brute_force_however_the_database_is_cut(
    seed: int, count: int, k: int, repeats: bool, size: int
) -> None:
    generator = np.random.default_rng(seed)
    vectors = unit(generator.normal(size=(count, 5)))
    if repeats:  # groups of equal vectors larger than k: the cut goes through a tie
        vectors = vectors[generator.integers(0, 3, count)]
    ids = np.sort(generator.choice(1000, count, replace=False)).astype(np.int64)
    k = min(k, count - 1)
    found, similarities = search(vectors, ids, k, size)
    np.testing.assert_array_equal(found, brute_force(vectors, ids, k))
    assert (np.diff(similarities, axis=1) <= 0).all()


@pytest.mark.parametrize("size", [1500, 700])
def test_a_thousand_equal_vectors_are_in_the_order_of_their_ids(size: int) -> None:
    found, _ = search(unit(np.ones((1500, 4))), np.arange(1500), 3, size)
    assert found[[0, 700]].tolist() == [[1, 2, 3], [0, 1, 2]]


@pytest.mark.parametrize(("index", "size"), [("ivf", 2000), ("ivf", 300), ("hnsw", 2000)])
def test_approximate_indexes_are_repeatable_and_miss_what_their_settings_let_them(index: str, size: int) -> None:
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(20, 16)) * 2
    vectors = unit(centres[generator.integers(0, 20, 2000)] + generator.normal(size=(2000, 16)))
    ids, truth = np.arange(2000), search(vectors, np.arange(2000), 10, 2000)[0]

    def recall(settings: IndexSettings) -> float:
        found = search(vectors, ids, 10, size, settings)[0]
        np.testing.assert_array_equal(found, search(vectors, ids, 10, size, settings)[0])
        return float(np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found, truth, strict=True)]))

    weak = recall(IndexSettings(index, nlist=40, nprobe=2, m=8, ef_construction=20, ef_search=12))
    assert 0.5 < weak < 1.0, "a weak index must not look exact"
    assert recall(IndexSettings(index, nlist=40, nprobe=40, m=32, ef_construction=200, ef_search=400)) > max(0.98, weak)


def test_cells_are_the_same_however_the_database_is_cut() -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(500, 8)))
    settings = IndexSettings("ivf", nlist=10, nprobe=2)
    whole, cut = (search(vectors, np.arange(500), 5, size, settings) for size in (500, 60))
    np.testing.assert_array_equal(whole[0], cut[0])


def test_shards_are_grouped_up_to_a_number_of_rows() -> None:
    rows = [4, 4, 9, 1, 0, 4]
    assert group(range(6), rows, 8) == [[0, 1], [2], [3, 4, 5]]
    assert group([0, 2, 3], rows, 10) == [[0], [2, 3]]
    assert group([], rows, 10) == []


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


@pytest.mark.parametrize("index", ["flat", "ivf"])
def test_on_ray_the_table_is_the_same(
    store: ArtifactStore, embeddings: Artifact, ray_local: None, monkeypatch: pytest.MonkeyPatch, index: str
) -> None:
    """Tasks of one shard each; the first shard is there already, from an attempt that was killed."""
    alone = Table.open(run(store, embeddings, k=3, index=index, nlist=2, nprobe=1)[1])
    expected = [alone.row(i)["neighbors"].tolist() for i in alone.ids]
    store.discard("neighbors", "n1")
    writer = store.begin("neighbors", "n1")
    rows = [{"image_id": i, "neighbors": [7, 7, 7], "similarities": [0.5, 0.5, 0.5]} for i in range(5)]
    writer.put_table(0, pa.Table.from_pylist(rows, schema=SCHEMAS["neighbors"]))
    writer.close()
    monkeypatch.setattr(on_ray, "RAY_FROM", 1)
    outcome, made = run(store, embeddings, k=3, index=index, nlist=2, nprobe=1)
    found = Table.open(made)
    assert [found.row(i)["neighbors"].tolist() for i in found.ids] == [[7, 7, 7]] * 5 + expected[5:]
    assert outcome.notes["gpus"] == 0


def test_cells_with_too_few_vectors_are_completed(
    store: ArtifactStore, images: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(200, 8)))
    writer = store.begin("embeddings", "e3")
    rows = [{"image_id": i, "embedding": vector} for i, vector in enumerate(vectors)]
    for shard in range(4):
        table = pa.Table.from_pylist(rows[50 * shard : 50 * shard + 50], schema=SCHEMAS["embeddings"])
        writer.put_table(shard, table)
    monkeypatch.setattr(blocks, "DATABASE_ROWS", 60)
    _, made = run(store, writer.commit(), k=150, index="ivf", nlist=5, nprobe=1)
    found = Table.open(made).column("neighbors")
    assert all(len(set(row)) == 150 and i not in row for i, row in enumerate(found.tolist()))


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
