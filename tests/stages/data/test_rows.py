"""Reading rows of shards in order: slices, ids and samples, across row groups and shards."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data.rows import iter_batches, iter_rows, sample_rows, slice_rows
from stages.data.tables import SCHEMAS

SIZES = [40, 0, 10, 11]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Boxes of images 0, 2, 4, ..., 120 in shards of `SIZES` rows, the first one in several row groups."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.store.writer.ROW_GROUP_BYTES", 600)
        writer = ArtifactStore(str(tmp_path_factory.mktemp("store"))).begin("boxes", "aaaaaaaaaaaa")
        for index, size in enumerate(SIZES):
            first = sum(SIZES[:index])
            rows = [{"image_id": 2 * i, "boxes": [[float(i)] * 4]} for i in range(first, first + size)]
            writer.put_table(index, pa.Table.from_pylist(rows, schema=SCHEMAS["boxes"]))
        return writer.commit()


@given(st.integers(0, 45), st.integers(0, 45), st.integers(1, 50))
def test_a_slice_of_a_shard(artifact: Artifact, start: int, stop: int, batch_rows: int) -> None:
    shard = next(artifact.shards())
    expected = list(range(0, 80, 2))[start:stop]
    batches = list(iter_batches(artifact, shard, ["image_id"], start=start, stop=stop, batch_rows=batch_rows))
    assert [i for batch in batches for i in batch["image_id"].to_pylist()] == expected
    assert all(0 < batch.num_rows <= batch_rows for batch in batches)
    rows = list(slice_rows(artifact, shard, ["boxes"], start, stop))
    assert [(row["image_id"], row["boxes"][0][0]) for row in rows] == [(i, i / 2) for i in expected]


def test_a_whole_shard_by_default(artifact: Artifact) -> None:
    [names] = {tuple(batch.schema.names) for batch in iter_batches(artifact, next(artifact.shards()))}
    assert names == ("image_id", "boxes")
    assert sum(batch.num_rows for batch in iter_batches(artifact, next(artifact.shards()))) == 40


def test_all_rows(artifact: Artifact) -> None:
    assert [row["image_id"] for row in iter_rows(artifact, ["boxes"])] == list(range(0, 122, 2))


@given(st.sets(st.integers(-3, 130)))
def test_rows_of_some_images(artifact: Artifact, ids: set[int]) -> None:
    rows = list(iter_rows(artifact, ["boxes"], ids=ids))
    assert [row["image_id"] for row in rows] == sorted(i for i in ids if 0 <= i <= 120 and i % 2 == 0)
    assert all(row["boxes"] == [[row["image_id"] / 2] * 4] for row in rows)


def test_pixels_of_other_shards_are_not_read(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.data import rows

    read: list[str] = []
    whole: Callable[..., object] = rows.iter_batches

    def spy(artifact: Artifact, shard: object, *rest: object, **options: object) -> object:
        read.append(shard.name)
        return whole(artifact, shard, *rest, **options)

    monkeypatch.setattr(rows, "iter_batches", spy)
    assert len(list(iter_rows(artifact, ["boxes"], ids={80, 82}))) == 2
    assert read == ["part-00002.parquet"]


@pytest.mark.parametrize(("count", "ids"), [(0, []), (1, [0]), (4, [0, 40, 80, 120]), (1000, list(range(0, 122, 2)))])
def test_a_sample_is_spread_over_all_shards(artifact: Artifact, count: int, ids: list[int]) -> None:
    assert [row["image_id"] for row in sample_rows(artifact, count, ["boxes"])] == ids


def test_a_sample_of_nothing(store: ArtifactStore) -> None:
    writer = store.begin("boxes", "bbbbbbbbbbbb")
    writer.put_table(0, SCHEMAS["boxes"].empty_table())
    assert list(sample_rows(writer.commit(), 5, ["boxes"])) == []
