"""What a worker makes of a slice, without Ray: plain Arrow rows, and a shard only from slices that belong together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import StageFailed
from pipeline.stage import Context
from pipeline.store.artifact import Artifact
from stages.data.rows import read_shard
from stages.map_images.slices import split
from stages.map_images.worker import SLICES, Job, run_slice, write_shard

SCHEMA = pa.schema([("image_id", pa.int64()), ("halves", pa.list_(pa.list_(pa.float32(), 2)))])


def halve(row: dict[str, Any]) -> dict[str, Any]:
    if row["image"] == b"bad":
        raise ValueError("it is bad")
    return {"halves": [[len(row["image"]) / 2, 0.5]] * (row["image_id"] % 3), "seen": 1}


@pytest.fixture
def job(images: Callable[..., Artifact], context: Callable[..., Context]) -> Job:
    source = images({f"{i}.jpg": b"bad" if i == 4 else b"x" * i for i in range(10)}, [6, 4])
    return Job(
        source,
        split([6, 4], None),
        context("halves").output,
        SCHEMA,
        ("image_id", "key", "image"),
        halve,
        (),
        None,
        16,
        2,
    )


def computed(job: Job, shard: int, start: int, stop: int) -> pa.Table:
    return run_slice(pa.Table.from_pylist([{"shard": shard, "start": start, "stop": stop}], SLICES), job)


def test_a_result_is_one_plain_row(job: Job) -> None:
    [row] = computed(job, 0, 2, 6).to_pylist()
    assert (row["shard"], row["start"], row["stop"]) == (0, 2, 6)
    assert row["counts"] == [("seen", 3)]
    assert row["problems"] == [{"key": "4.jpg", "reason": "ValueError: it is bad"}]
    assert [made["image_id"] for made in row["rows"]] == [2, 3, 5]
    assert row["rows"][0]["halves"] == [[1.0, 0.5], [1.0, 0.5]]


@pytest.mark.parametrize("ends", [[6], [2, 6], [0, 2, 4, 5, 5, 6]])
def test_slices_make_a_shard(job: Job, ends: list[int]) -> None:
    slices = [computed(job, 0, start, stop) for start, stop in zip([0, *ends], ends, strict=False)]
    done = write_shard(pa.concat_tables(slices), job)
    assert done.schema == SLICES
    assert done["stop"].to_pylist() == ends
    problem = {"key": "4.jpg", "reason": "ValueError: it is bad"}
    [record] = job.output.records().values()
    assert record == {"images": 5, "counts": {"seen": 5}, "problems": [problem]}
    job.output.put_table(1, SCHEMA.empty_table())
    made = job.output.commit()
    rows = read_shard(made, next(made.shards())).to_pylist()
    assert rows == [{"image_id": i, "halves": [[i / 2, 0.5]] * (i % 3)} for i in (0, 1, 2, 3, 5)]


@pytest.mark.parametrize("slices", [[(0, 0, 6), (1, 0, 4)], [(0, 0, 2), (0, 3, 6)], [(0, 3, 6), (0, 0, 3)]])
def test_slices_that_are_not_one_shard_are_refused(job: Job, slices: list[tuple[int, int, int]]) -> None:
    with pytest.raises(StageFailed, match="not one shard"):
        write_shard(pa.concat_tables([computed(job, *one) for one in slices]), job)
    assert job.output.records() == {}
