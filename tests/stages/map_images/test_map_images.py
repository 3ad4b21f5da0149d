"""`map_shards` on a real Ray: parts, pieces, resuming, failures of images and of workers, actors."""

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

from pipeline.errors import ArtifactDamaged, ClusterError, SourceError, StageFailed
from pipeline.stage import Context
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data.images import ImageError
from stages.data.tables import open_shard
from stages.map_images.driver import _pieces, map_shards

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


class Short:
    def __call__(self, rows: list[dict[str, Any]]) -> list[Any]:
        return []


def files(count: int, **special: bytes) -> dict[str, bytes]:
    named = {f"{i:03d}.jpg": b"x" * (i + 10) for i in range(count)}
    return named | {f"{name[1:]}.jpg": data for name, data in special.items()}


def rows_of(artifact: Artifact) -> list[list[int]]:
    return [open_shard(artifact, entry)["image_id"].to_pylist() for entry in artifact.shards()]


@pytest.mark.parametrize("parts", [[40], [8] * 5], ids=["pieces", "whole parts"])
def test_one_output_part_per_images_part(
    ray_local: None, images: Callable[..., Artifact], context: Callable[..., Context], parts: list[int]
) -> None:
    source = images(files(40, _007=b"bad", _031=b"odd"), parts)
    ctx = context("sizes")
    seen: list[float] = []
    ctx.report_progress = lambda done, total, unit: seen.append(done / total)
    summary = map_shards(ctx, source, measure, schema=SCHEMA)
    made = ctx.output.commit()
    assert [entry.name for entry in made.shards()] == [entry.name for entry in source.shards()]
    ids = [i for part in rows_of(made) for i in part]
    assert ids == [i for i in range(40) if i not in (7, 31)]
    assert len(rows_of(made)[0]) == (38 if len(parts) == 1 else 7)
    assert (summary.images, summary.failed) == (38, 2)
    assert summary.counts == {"bytes": sum(i + 10 for i in range(40) if i not in (7, 31))}
    assert summary.problems == [
        {"key": "007.jpg", "reason": "it is bad"},
        {"key": "031.jpg", "reason": "ZeroDivisionError: odd indeed"},
    ]
    assert seen[0] == 0
    assert seen[-1] == 1
    assert seen == sorted(seen)


RECORDS = [
    {"images": 7, "counts": {"bytes": 1}, "problems": [{"key": "003.jpg", "reason": "it is bad"}]},
    {"images": 8, "counts": {"bytes": 1}, "problems": []},
]


def test_missing_parts_only(
    ray_local: None, images: Callable[..., Artifact], context: Callable[..., Context], tmp_path: Path
) -> None:
    """A first attempt dies after two parts; the second computes the rest, and the counts cover both."""
    source = images(files(40, _003=b"bad"), [8] * 5)
    first = context("sizes")
    map_shards(first, source, measure, schema=SCHEMA)
    whole = first.output.commit()
    attempt = context("sizes", "fedcba987654")
    for index, entry in list(enumerate(whole.shards()))[:2]:
        attempt.output.record(f"shard-{index:05d}", RECORDS[index])
        attempt.output.put_table(index, open_shard(whole, entry))
    attempt.output.put_table(2, open_shard(whole, list(whole.shards())[2]))  # killed before it was counted
    attempt.output.close()
    again = context("sizes", "fedcba987654")
    summary = map_shards(again, source, measure, schema=SCHEMA, arguments=(str(tmp_path),))
    touched = {int(path.name.split(".")[0]) for path in tmp_path.iterdir() if path.name.split(".")[0].isdigit()}
    assert touched == set(range(16, 40))
    assert summary.resumed == 2
    assert (summary.images, summary.failed) == (39, 1)
    assert summary.problems == [{"key": "003.jpg", "reason": "it is bad"}]
    assert rows_of(again.output.commit()) == rows_of(whole)


def test_a_finished_stage_starts_no_job(
    images: Callable[..., Artifact], context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, ctx = images(files(16), [8, 8]), context("sizes")
    for index in range(2):
        ctx.output.record(f"shard-{index:05d}", {"images": 8, "counts": {}, "problems": []})
        ctx.output.put_table(index, SCHEMA.empty_table())
    monkeypatch.setattr("stages.map_images.driver._pool", lambda *a, **k: pytest.fail("asked for a cluster"))
    assert map_shards(ctx, source, measure, schema=SCHEMA).images == 16


def test_a_killed_worker_is_replaced(
    ray_local: None, images: Callable[..., Artifact], context: Callable[..., Context], tmp_path: Path
) -> None:
    source, ctx = images(files(16, _009=b"crash")), context("sizes")
    summary = map_shards(ctx, source, measure, schema=SCHEMA, arguments=(str(tmp_path),))
    assert (tmp_path / "crashed").exists()
    assert (summary.images, summary.failed) == (16, 0)
    assert rows_of(ctx.output.commit()) == [list(range(16))]


def test_no_usable_image(ray_local: None, images: Callable[..., Artifact], context: Callable[..., Context]) -> None:
    source = images({"a.jpg": b"bad", "b.jpg": b"bad"})
    with pytest.raises(SourceError, match=r"none of the 2 images .* could be used \(a\.jpg: it is bad; b\.jpg"):
        map_shards(context("sizes"), source, measure, schema=SCHEMA)


def test_actors_on_batches(ray_local: None, images: Callable[..., Artifact], context: Callable[..., Context]) -> None:
    source, ctx = images(files(21, _004=b"bad", _012=b"cold")), context("sizes")
    summary = map_shards(
        ctx, source, Measure, schema=SCHEMA, arguments=(1000,), prepare=count_bytes, batch_rows=4, cpus=2
    )
    assert (summary.images, summary.failed) == (19, 2)
    assert [problem["key"] for problem in summary.problems] == ["004.jpg", "012.jpg"]
    made = ctx.output.commit()
    sizes = dict(zip(rows_of(made)[0], open_shard(made, next(made.shards()))["size"].to_pylist(), strict=True))
    assert sizes == {i: 1010 + i for i in range(21) if i not in (4, 12)}


@pytest.mark.parametrize(
    ("process", "image", "error", "message"),
    [
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
        map_shards(context("sizes"), source, process, schema=SCHEMA, arguments=arguments, prepare=count_bytes)


def test_a_worker_that_the_cluster_cannot_hold(
    ray_local: None, images: Callable[..., Artifact], context: Callable[..., Context]
) -> None:
    with pytest.raises(ClusterError, match="one worker asks for 1000 CPUs"):
        map_shards(context("sizes", cpus=1000), images(files(2)), measure, schema=SCHEMA)


def test_pieces_cover_every_row_once(images: Callable[..., Artifact]) -> None:
    for parts in ([1], [100], [3, 0, 90, 7], [5] * 30):
        source = images(files(sum(parts)), parts)
        missing = list(enumerate(source.shards()))
        pieces = _pieces(missing, workers=2)
        for index, entry in missing:
            own = [piece for piece in pieces if piece.shard == index]
            assert [row for piece in own for row in range(piece.start, piece.stop)] == list(range(entry.rows or 0))
            assert all(piece.whole == (len(own) == 1) for piece in own)
        if parts == [100]:
            assert len(pieces) == 8


def slowly(row: dict[str, Any], folder: str) -> dict[str, Any]:
    time.sleep(0.05)
    return measure(row, folder)


def test_after_kill_9_of_the_driver_only_missing_parts_are_computed(
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
        import test_map_images
        from ray import cloudpickle
        from pipeline.run import cluster
        from pipeline.stage import Context, Resources
        from pipeline.store.store import ArtifactStore
        cloudpickle.register_pickle_by_value(test_map_images)
        cluster.start({ray.get_runtime_context().gcs_address!r})
        store = ArtifactStore({store.address!r})
        source = store.find("images", {source.fingerprint!r})
        context = Context("sizes", "ba9876543210", {{}}, store.begin("sizes", "ba9876543210"), Resources())
        folder = {str(tmp_path / "first")!r}
        test_map_images.map_shards(context, source, test_map_images.slowly, schema=test_map_images.SCHEMA, arguments=(folder,))
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
    summary = map_shards(ctx, source, measure, schema=SCHEMA, arguments=(str(tmp_path / "second"),))
    assert 2 <= summary.resumed < 10
    assert len(list((tmp_path / "second").iterdir())) == 60 - 6 * summary.resumed
    assert (summary.images, summary.failed) == (60, 0)
    assert rows_of(ctx.output.commit()) == [list(range(at, at + 6)) for at in range(0, 60, 6)]
