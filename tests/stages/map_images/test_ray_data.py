"""`map_images` on a real Ray: whole shards and slices, resuming, failures of images and of workers, actors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import ArtifactDamaged, ClusterError, SourceError, StageFailed, UsageError
from pipeline.stage import Context, Resources
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data.images import ImageError
from stages.data.rows import read_shard
from stages.map_images.ray_data import map_images

pytestmark = pytest.mark.slow
SCHEMA = pa.schema([("image_id", pa.int64()), ("size", pa.int32())])


def measure(row: dict[str, Any], folder: str | None = None) -> dict[str, Any]:
    """The process under test: fails on "bad", crashes its worker once on "crash"."""
    if row["image"] == b"bad":
        raise ImageError("it is bad")
    if row["image"] == b"odd":
        raise ZeroDivisionError("odd\nindeed")
    if folder is not None:
        (Path(folder) / f"{row['image_id']}.{os.getpid()}").touch()
        if row["image"] == b"crash" and not (Path(folder) / "crashed").exists():
            (Path(folder) / "crashed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return {"size": len(row["image"]), "bytes": len(row["image"])}


class Measure:
    """The same as an actor on batches."""

    def __init__(self, offset: int) -> None:
        self.offset = offset

    def __call__(self, rows: list[dict[str, Any]]) -> list[Any]:
        if any(row["image"] == b"stop" for row in rows):
            raise ArtifactDamaged("encoder/1", "encoder.safetensors", "its content differs")
        if any(row["image"] == b"full" for row in rows):
            raise RuntimeError("no memory left")
        return [ImageError("cold") if row["image"] == b"cold" else {"size": self.offset + row["n"]} for row in rows]


def count_bytes(row: dict[str, Any]) -> dict[str, Any]:
    if row["image"] == b"bad":
        raise ImageError("it is bad")
    return {**row, "n": len(row["image"])}


class Unready:
    def __init__(self) -> None:
        raise UsageError("stages.sizes.crop: 30 pixels do not split into patches of 8: set it to 24 or 32")


class Short:
    def __call__(self, rows: list[dict[str, Any]]) -> list[Any]:
        return []


def files(count: int, **special: bytes) -> dict[str, bytes]:
    named = {f"{i:03d}.jpg": b"x" * (i + 10) for i in range(count)}
    return named | {f"{name[1:]}.jpg": data for name, data in special.items()}


def ids_of(artifact: Artifact) -> list[list[int]]:
    return [read_shard(artifact, shard)["image_id"].to_pylist() for shard in artifact.shards()]


@pytest.mark.parametrize("shards", [[40], [2] * 20], ids=["in slices", "as whole shards"])
def test_one_output_shard_per_shard_of_images(
    ray_local: None, images: Callable[..., Artifact], context: Callable[..., Context], shards: list[int]
) -> None:
    source = images(files(40, _007=b"bad", _031=b"odd"), shards)
    ctx = context("sizes")
    seen: list[float] = []
    ctx.report_progress = lambda done, total, unit: seen.append(done / total)
    summary = map_images(ctx, source, measure, schema=SCHEMA)
    made = ctx.output.commit()
    assert [shard.name for shard in made.shards()] == [shard.name for shard in source.shards()]
    expected = [[i for i in ids if i not in (7, 31)] for ids in ids_of(source)]
    assert ids_of(made) == expected
    assert (summary.images, summary.failed) == (38, 2)
    assert summary.counts == {"bytes": sum(i + 10 for i in range(40) if i not in (7, 31))}
    assert summary.problems == [
        {"key": "007.jpg", "reason": "it is bad"},
        {"key": "031.jpg", "reason": "ZeroDivisionError: odd indeed"},
    ]
    assert (seen[0], seen[-1]) == (0, 1)
    assert seen == sorted(set(seen))
    assert len(seen) > len(shards), "a report for every shard"


def test_a_shard_has_the_same_bytes_however_it_was_cut(
    ray_local: None, images: Callable[..., Artifact], context: Callable[..., Context]
) -> None:
    source, stored = images(files(70), [60, 0, 10]), []
    for workers in (1, 2):
        ctx = context("sizes", f"{workers:012x}")
        ctx.resources = Resources(concurrency=workers)
        map_images(ctx, source, measure, schema=SCHEMA)
        stored.append([shard.stored for shard in ctx.output.commit().shards()])
    assert stored[0] == stored[1]
    assert len(stored[0]) == 3


RECORDS = [
    {"images": 7, "counts": {"bytes": 1}, "problems": [{"key": "003.jpg", "reason": "it is bad"}]},
    {"images": 8, "counts": {"bytes": 1}, "problems": []},
]


@pytest.mark.parametrize(("shards", "shard_rows"), [([8] * 5, None), ([16, 24], 8)])
def test_missing_shards_only(
    ray_local: None,
    images: Callable[..., Artifact],
    context: Callable[..., Context],
    tmp_path: Path,
    shards: list[int],
    shard_rows: int | None,
) -> None:
    """A first attempt dies after two shards; the second computes the rest, and the counts cover both."""
    source = images(files(40, _003=b"bad"), shards)
    first = context("sizes")
    map_images(first, source, measure, schema=SCHEMA, shard_rows=shard_rows)
    whole = first.output.commit()
    attempt = context("sizes", "fedcba987654")
    for index, entry in list(enumerate(whole.shards()))[:2]:
        attempt.output.record(f"shard-{index:05d}", RECORDS[index])
        attempt.output.put_table(index, read_shard(whole, entry))
    attempt.output.put_table(2, read_shard(whole, list(whole.shards())[2]))  # killed before it was counted
    attempt.output.close()
    again = context("sizes", "fedcba987654")
    summary = map_images(again, source, measure, schema=SCHEMA, arguments=(str(tmp_path),), shard_rows=shard_rows)
    touched = {int(path.name.split(".")[0]) for path in tmp_path.iterdir() if path.name.split(".")[0].isdigit()}
    assert touched == set(range(16, 40))
    assert summary.resumed == 2
    assert [shard.rows for shard in whole.shards()] == [7, 8, 8, 8, 8]
    assert (summary.images, summary.failed) == (39, 1)
    assert summary.problems == [{"key": "003.jpg", "reason": "it is bad"}]
    assert ids_of(again.output.commit()) == ids_of(whole)


def test_a_finished_stage_starts_no_job(
    images: Callable[..., Artifact], context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, ctx = images(files(16), [8, 8]), context("sizes")
    for index in range(2):
        ctx.output.record(f"shard-{index:05d}", {"images": 8, "counts": {}, "problems": []})
        ctx.output.put_table(index, SCHEMA.empty_table())
    monkeypatch.setattr("stages.map_images.ray_data._pool", lambda *a, **k: pytest.fail("asked for a cluster"))
    assert map_images(ctx, source, measure, schema=SCHEMA).images == 16


def test_a_killed_worker_is_replaced(
    ray_local: None, images: Callable[..., Artifact], context: Callable[..., Context], tmp_path: Path
) -> None:
    source, ctx = images(files(16, _009=b"crash")), context("sizes")
    summary = map_images(ctx, source, measure, schema=SCHEMA, arguments=(str(tmp_path),))
    assert (tmp_path / "crashed").exists()
    assert (summary.images, summary.failed) == (16, 0)
    assert ids_of(ctx.output.commit()) == [list(range(16))]


def test_no_usable_image(ray_local: None, images: Callable[..., Artifact], context: Callable[..., Context]) -> None:
    source = images({"a.jpg": b"bad", "b.jpg": b"bad"})
    with pytest.raises(SourceError, match=r"none of the 2 images .* could be used \(a\.jpg: it is bad; b\.jpg"):
        map_images(context("sizes"), source, measure, schema=SCHEMA)


def test_actors_on_batches(ray_local: None, images: Callable[..., Artifact], context: Callable[..., Context]) -> None:
    source, ctx = images(files(21, _004=b"bad", _012=b"cold")), context("sizes")
    summary = map_images(
        ctx, source, Measure, schema=SCHEMA, arguments=(1000,), prepare=count_bytes, batch_rows=4, cpus=2
    )
    assert (summary.images, summary.failed) == (19, 2)
    assert [problem["key"] for problem in summary.problems] == ["004.jpg", "012.jpg"]
    made = ctx.output.commit()
    sizes = dict(zip(ids_of(made)[0], read_shard(made, next(made.shards()))["size"].to_pylist(), strict=True))
    assert sizes == {i: 1010 + i for i in range(21) if i not in (4, 12)}


def test_actors_that_own_every_cpu(
    ray_local: None, images: Callable[..., Artifact], context: Callable[..., Context]
) -> None:
    """One shard in slices by two actors: its slices are put together without a CPU to spare."""
    source, ctx = images(files(40), [40]), context("sizes")
    summary = map_images(ctx, source, Measure, schema=SCHEMA, arguments=(0,), prepare=count_bytes, cpus=1)
    assert summary.images == 40
    assert ids_of(ctx.output.commit()) == [list(range(40))]


@pytest.mark.parametrize(
    ("process", "image", "error", "message"),
    [
        (Unready, b"any", UsageError, "stages.sizes.crop: 30 pixels"),
        (Measure, b"stop", ArtifactDamaged, "encoder.safetensors"),
        (Measure, b"full", StageFailed, "a worker failed: RuntimeError: no memory left"),
        (Short, b"any", StageFailed, "Short gave 0 rows for"),
    ],
)
def test_an_error_of_the_whole_stage_stops_it(
    ray_local: None,
    images: Callable[..., Artifact],
    context: Callable[..., Context],
    process: type,
    image: bytes,
    error: type[Exception],
    message: str,
) -> None:
    source = images(files(5, _004=image))
    arguments = (0,) if process is Measure else ()
    with pytest.raises(error, match=message):
        map_images(context("sizes"), source, process, schema=SCHEMA, arguments=arguments, prepare=count_bytes)


def test_a_worker_that_the_cluster_cannot_hold(
    ray_local: None, images: Callable[..., Artifact], context: Callable[..., Context]
) -> None:
    with pytest.raises(ClusterError, match="one worker asks for 1000 CPUs"):
        map_images(context("sizes", cpus=1000), images(files(2)), measure, schema=SCHEMA)


def slowly(row: dict[str, Any], folder: str) -> dict[str, Any]:
    time.sleep(0.05)
    return measure(row, folder)


def test_after_kill_9_of_the_driver_only_missing_shards_are_computed(
    ray_local: None,
    images: Callable[..., Artifact],
    context: Callable[..., Context],
    store: ArtifactStore,
    tmp_path: Path,
) -> None:
    import ray

    source = images(files(60), [6] * 10)
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    driver = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_ray_data
        from ray import cloudpickle
        from pipeline.run import cluster
        from pipeline.stage import Context, Resources
        from pipeline.store.store import ArtifactStore
        cloudpickle.register_pickle_by_value(test_ray_data)
        cluster.start({ray.get_runtime_context().gcs_address!r})
        store = ArtifactStore({store.address!r})
        source = store.find("images", {source.fingerprint!r})
        context = Context("sizes", "ba9876543210", {{}}, store.begin("sizes", "ba9876543210"), Resources())
        folder = {str(tmp_path / "first")!r}
        slowly, schema = test_ray_data.slowly, test_ray_data.SCHEMA
        test_ray_data.map_images(context, source, slowly, schema=schema, arguments=(folder,))
    """)
    output = tmp_path / "store" / "sizes" / "ba9876543210"
    with subprocess.Popen([sys.executable, "-c", driver]) as process:
        deadline = time.monotonic() + 120
        while len(list(output.glob("part-*"))) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    time.sleep(1)  # Ray ends what the dead driver had started
    ctx = context("sizes")
    summary = map_images(ctx, source, measure, schema=SCHEMA, arguments=(str(tmp_path / "second"),))
    assert 2 <= summary.resumed < 10
    assert len(list((tmp_path / "second").iterdir())) == 60 - 6 * summary.resumed
    assert (summary.images, summary.failed) == (60, 0)
    assert ids_of(ctx.output.commit()) == [list(range(at, at + 6)) for at in range(0, 60, 6)]
