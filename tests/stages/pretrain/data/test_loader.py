"""The same batches whatever the ranks, workers and first step; bad images are replaced, counted and named."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.errors import ClusterError, SourceError, UsageError
from pipeline.store.store import ArtifactStore
from stages.data.tables import SCHEMAS, Table, pack_labels
from stages.pretrain.data.batch import Batch
from stages.pretrain.data.loader import ImageSource, TrainData
from stages.pretrain.views.draw import draw_views
from stages.pretrain.views.plan import Drawn, ImageRow, Photometric, ViewPlan, ViewSpec
from tests.conftest import encode, smooth_pixels

COLOURS = Photometric(jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray_p=0.2, blur_p=0.5, solarize_p=0.2)
VIEWS = (
    ViewSpec("global", 32, 2, (0.25, 1.0), flip_p=0.5, photometric=COLOURS),
    ViewSpec("local", 16, 3, (0.05, 0.25), photometric=COLOURS),
)
PLAN = ViewPlan(VIEWS)
MakeTable = Callable[..., Table]


@pytest.fixture
def make_table(tmp_path: Path) -> MakeTable:
    """`make_table("images", rows)`: an artifact's table; columns not given are null."""
    store, made = ArtifactStore(str(tmp_path / "store")), iter(range(100))

    def make(kind: str, rows: Sequence[dict[str, Any]]) -> Table:
        writer = store.begin(kind, f"{next(made):024d}")
        full = [dict.fromkeys(SCHEMAS[kind].names) | row for row in rows]
        writer.put_table(0, pa.Table.from_pylist(full, schema=SCHEMAS[kind]))
        return Table.open(writer.commit())

    return make


def photo(image_id: int, width: int = 70, height: int = 52, **more: Any) -> dict[str, Any]:
    data = encode(smooth_pixels(width, height, image_id))
    row = {"image_id": image_id, "key": f"{image_id:03d}.jpg", "image": data, "width": width, "height": height}
    return row | more


@pytest.fixture
def photos(make_table: MakeTable) -> Table:
    return make_table("images", [photo(i) for i in range(20)])


def batches(
    sources: ImageSource | Sequence[ImageSource], start: int, stop: int, plan: ViewPlan = PLAN, **options: Any
) -> list[Batch]:
    sources = [sources] if isinstance(sources, ImageSource) else sources
    options = {"global_batch": 8, "seed": 5} | options
    return list(TrainData(sources, plan, **options).batches(start, stop))


def assert_same(got: Batch, wanted: Batch, rows: slice = slice(None)) -> None:
    assert got.seed == wanted.seed
    assert torch.equal(got.image_ids, wanted.image_ids[rows])
    assert torch.equal(got.source, wanted.source[rows])
    for mine, theirs in ((got.views, wanted.views), (got.affines, wanted.affines), (got.labels, wanted.labels)):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert torch.equal(mine[name], theirs[name][:, rows]), name
    for name in got.extras:
        assert torch.equal(got.extras[name], wanted.extras[name][rows])
    assert got.neighbor_ids is not None
    assert wanted.neighbor_ids is not None
    assert torch.equal(got.neighbor_ids, wanted.neighbor_ids[rows])


def test_a_batch_has_the_shapes_of_its_contract(photos: Table) -> None:
    batch = batches(ImageSource(photos), 0, 1)[0]
    assert batch.views["global"].shape == (2, 8, 3, 32, 32)
    assert batch.views["local"].shape == (3, 8, 3, 16, 16)
    assert batch.affines["local"].shape == (3, 8, 2, 3)
    assert batch.views["global"].dtype == batch.affines["global"].dtype == torch.float32
    assert batch.image_ids.dtype == batch.source.dtype == torch.int64
    assert batch.neighbor_ids is not None
    assert batch.neighbor_ids.tolist() == [-1] * 8
    assert not batch.skipped


def test_values_are_normalised(make_table: MakeTable) -> None:
    pixels = np.full((40, 40, 3), (255, 0, 51), np.uint8)
    source = ImageSource(make_table("images", [photo(0, 40, 40, image=encode(pixels, "PNG"))]))
    plan = ViewPlan((ViewSpec("v", 32),))
    for renderer in ("cpu", "gpu"):
        scale = {"mean": (0.5, 0.25, 0.1), "std": (0.5, 0.25, 0.2)}
        got = batches(source, 0, 1, plan, renderer=renderer, device="cpu", **scale)[0].views["v"].amax((0, 1, 3, 4))
        torch.testing.assert_close(got, torch.tensor([1.0, -1.0, 0.5]), rtol=0, atol=1e-5)


def test_ranks_share_the_same_global_batch(photos: Table) -> None:
    whole = batches(ImageSource(photos), 1, 4)
    for world in (2, 4):
        for rank in range(world):
            share = batches(ImageSource(photos), 1, 4, rank=rank, world_size=world)
            rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
            for got, wanted in zip(share, whole, strict=True):
                assert_same(got, wanted, rows)
                assert got.offset == rows.start


@pytest.mark.slow
def test_worker_processes_change_nothing(photos: Table) -> None:
    state = torch.get_rng_state()
    wanted = batches(ImageSource(photos), 0, 3)
    got = batches(ImageSource(photos), 0, 3, workers=2)
    for a, b in zip(got, wanted, strict=True):
        assert_same(a, b)
    assert torch.equal(torch.get_rng_state(), state)


def test_starting_later_gives_the_same_steps(photos: Table) -> None:
    whole = batches(ImageSource(photos), 0, 6)
    for got, wanted in zip(batches(ImageSource(photos), 3, 6), whole[3:], strict=True):
        assert_same(got, wanted)
    assert len({batch.seed for batch in whole}) == 6


def test_views_change_with_the_epoch_and_within_a_repeated_set(make_table: MakeTable) -> None:
    source = ImageSource(make_table("images", [photo(i) for i in range(3)]))
    first, second = batches(source, 0, 2)
    seen = [batch.affines["local"][:, i] for batch in (first, second) for i in range(8)]
    assert len({tuple(affine.flatten().tolist()) for affine in seen}) == 16


def test_mixed_sources_keep_their_proportion(make_table: MakeTable, photos: Table) -> None:
    objects = make_table("images", [photo(i, 40, 40) for i in range(6)])
    mixed = [ImageSource(photos, weight=1.0), ImageSource(objects, weight=3.0, ids=[1, 2, 4])]
    for batch in batches(mixed, 0, 4):
        assert (batch.source == 1).sum() == 6
        assert set(batch.image_ids[batch.source == 1].tolist()) <= {1, 2, 4}


# -------------------------------------------------------------------------------------------------------- bad input
def test_unreadable_images_are_replaced_counted_and_named(make_table: MakeTable) -> None:
    rows = [photo(i) for i in range(8)]
    rows[3]["image"] = rows[3]["image"][:200]
    rows[5]["image"] = b"not an image"
    rows[6]["width"] = 69
    data = TrainData([ImageSource(make_table("images", rows))], PLAN, global_batch=8, seed=0)
    problems: dict[str, str] = {}
    for batch in data.batches(0, 2):
        problems |= batch.problems
        assert len(batch) == 8
        assert not {3, 5, 6} & set(batch.image_ids.tolist())
        assert batch.skipped["unreadable image"] >= 3
        assert set(batch.skipped) == {"unreadable image"}
    assert set(problems) == {"003.jpg", "005.jpg", "006.jpg"}
    assert "its row says 69x52" in problems["006.jpg"]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_no_usable_image_is_an_error_that_names_one(make_table: MakeTable, workers: int) -> None:
    source = ImageSource(make_table("images", [photo(i, image=b"nothing") for i in range(3)]))
    with pytest.raises(SourceError, match=r"^images: none of the 3 .*00\d\.jpg: unreadable image \(not an"):
        batches(source, 0, 1, workers=workers)


def test_small_and_grey_images_are_enlarged(make_table: MakeTable) -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    rows = [photo(0, 3, 200), photo(1, 1, 1), photo(2, 8, 8, image=encode(np.stack([grey] * 3, 2)[..., 0], "PNG"))]
    batch = batches(ImageSource(make_table("images", rows)), 0, 1, ViewPlan((ViewSpec("v", 32, 2),)), global_batch=3)[0]
    assert sorted(batch.image_ids.tolist()) == [0, 1, 2]
    assert batch.views["v"].isfinite().all()


class SkipSome:
    """A drawer that cannot use odd images, reads boxes and pixels, and stacks an extra."""

    def __call__(self, rng: np.random.Generator, row: ImageRow) -> Drawn:
        draws = draw_views(VIEWS[:1], rng, row.width, row.height)
        assert row.boxes is not None
        assert row.pixels().shape == (row.height, row.width, 3)
        boxes = np.zeros((4, 4), np.float32)
        boxes[: len(row.boxes)] = row.boxes
        return Drawn(draws, {"boxes": boxes}, "odd image" if row.image_id % 2 else None)


def test_a_drawer_replaces_the_standard_one(make_table: MakeTable, photos: Table) -> None:
    boxes = make_table("boxes", [{"image_id": i, "boxes": [[0.0, 1, 20, 30 + i]] * (i % 3)} for i in range(19)])
    plan = ViewPlan(VIEWS[:1], ("boxes",), SkipSome())
    whole = batches(ImageSource(photos, boxes=boxes), 0, 2, plan)
    for batch in whole:
        assert batch.extras["boxes"].shape == (8, 4, 4)
        assert not (batch.image_ids % 2).any()
        assert batch.skipped["odd image"] > 0
        for i, found in zip(batch.image_ids.tolist(), batch.extras["boxes"], strict=True):
            assert int((found[:, 3] == 30 + i).sum()) == (i % 3 if i < 19 else 0)
    half = batches(ImageSource(photos, boxes=boxes), 0, 2, plan, rank=1, world_size=2)
    for got, wanted in zip(half, whole, strict=True):
        assert_same(got, wanted, slice(4, 8))


class Uneven:
    def __call__(self, rng: np.random.Generator, row: ImageRow) -> Drawn:
        return Drawn(draw_views(VIEWS[:1], rng, row.width, row.height)[: 1 + row.image_id % 2])


def test_a_drawer_with_uneven_views_is_refused(photos: Table) -> None:
    with pytest.raises(ValueError, match="different shapes within a batch"):
        batches(ImageSource(photos), 0, 1, ViewPlan(VIEWS[:1], drawer=Uneven()))


class Dies:
    def __call__(self, rng: np.random.Generator, row: ImageRow) -> Drawn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


@pytest.mark.slow
def test_a_killed_worker_process_ends_the_run(photos: Table) -> None:
    with pytest.raises(ClusterError, match="loader_workers"):
        batches(ImageSource(photos), 0, 1, ViewPlan(VIEWS[:1], drawer=Dies()), workers=1)


def test_missing_tables_and_uneven_ranks_are_refused(photos: Table) -> None:
    with pytest.raises(UsageError, match="give the method a `superpixels` stage"):
        batches(ImageSource(photos), 0, 1, ViewPlan(VIEWS, ("superpixels",)))
    with pytest.raises(ValueError, match="3 ranks cannot share a batch of 8"):
        batches(ImageSource(photos), 0, 1, world_size=3)


# ----------------------------------------------------------------------------------------------------------- tables
NEIGHBOR_PLAN = ViewPlan((*VIEWS[:1], ViewSpec("neighbor", 32, of="neighbor")), ("neighbors",))


def test_neighbours_are_drawn_evenly_from_the_row(make_table: MakeTable) -> None:
    rows = [photo(i) for i in range(6)]
    rows[5]["image"] = b"broken"
    table = make_table("neighbors", [{"image_id": i, "neighbors": [(i + k) % 6 for k in (1, 2, 3)]} for i in range(4)])
    images = make_table("images", rows)
    seen: dict[int, list[int]] = {}
    for batch in batches(ImageSource(images, neighbors=table), 0, 60, NEIGHBOR_PLAN):
        assert batch.neighbor_ids is not None
        for i, neighbor in zip(batch.image_ids.tolist(), batch.neighbor_ids.tolist(), strict=True):
            seen.setdefault(i, []).append(neighbor)
    assert set(seen[0]) == {1, 2, 3}
    assert all(0.2 < seen[0].count(k) / len(seen[0]) < 0.46 for k in (1, 2, 3))
    assert set(seen[3]) == {4, 0}  # the unreadable one is passed over
    assert set(seen[4]) == {-1}  # not in the table


def test_neighbours_stay_in_the_split(make_table: MakeTable, photos: Table) -> None:
    table = make_table("neighbors", [{"image_id": i, "neighbors": [(i + 1) % 20, (i + 2) % 20]} for i in range(20)])
    for batch in batches(ImageSource(photos, ids=[0, 2, 3, 7], neighbors=table), 0, 6, NEIGHBOR_PLAN):
        assert batch.neighbor_ids is not None
        for i, neighbor in zip(batch.image_ids.tolist(), batch.neighbor_ids.tolist(), strict=True):
            assert neighbor == {0: 2, 2: 3, 3: -1, 7: -1}[i]


@pytest.mark.parametrize("renderer", ["cpu", "gpu"])
def test_a_neighbour_that_is_not_there_has_no_row(make_table: MakeTable, renderer: str) -> None:
    """Scenes have none, even where a table names some. Every row left is that of an image with a neighbour."""
    flat = [np.full((40, 40, 3), 20 * i, np.uint8) for i in range(12)]
    images = make_table("images", [photo(i, 40, 40, image=encode(flat[i], "PNG")) for i in range(12)])
    table = make_table("neighbors", [{"image_id": i, "neighbors": [(i + 1) % 12]} for i in range(0, 12, 3)])
    objects = ImageSource(images, neighbors=table)
    scenes = ImageSource(images, neighbors=table, role="scenes")
    plan = ViewPlan((ViewSpec("global", 32), ViewSpec("neighbor", 32, of="neighbor")), ("neighbors",))
    options = {"renderer": renderer, "device": "cpu", "mean": (0, 0, 0), "std": (1, 1, 1)}
    for rank in range(2):
        for batch in batches([objects, scenes], 0, 6, plan, rank=rank, world_size=2, **options):
            assert batch.neighbor_ids is not None
            there = batch.neighbor_ids[batch.neighbor_ids >= 0]
            assert set(batch.source[batch.neighbor_ids >= 0].tolist()) <= {0}
            assert batch.views["neighbor"].shape == (1, len(there), 3, 32, 32)
            assert batch.affines["neighbor"].shape == (1, len(there), 2, 3)
            shown = (batch.views["neighbor"][0].mean(dim=(1, 2, 3)) * 255 / 20).round().long()
            assert shown.tolist() == there.tolist()
    alone = batches(scenes, 0, 1, plan, **options)[0]  # a whole batch without a neighbour
    assert alone.views["neighbor"].shape == (1, 0, 3, 32, 32)


def test_embeddings_come_with_their_images(make_table: MakeTable, photos: Table) -> None:
    table = make_table("embeddings", [{"image_id": i, "embedding": [float(i), 1.0]} for i in range(20) if i != 4])
    skipped: Counter[str] = Counter()
    for batch in batches(ImageSource(photos, embeddings=table), 0, 5, ViewPlan(VIEWS, ("embeddings",))):
        assert batch.extras["embedding"].tolist() == [[float(i), 1.0] for i in batch.image_ids.tolist()]
        assert 4 not in batch.image_ids  # without an embedding: replaced and counted
        skipped += Counter(batch.skipped)
    assert skipped == {"no embedding": 2}  # once in each of the two epochs
    with pytest.raises(UsageError, match="give the method a `embeddings` stage"):
        batches(ImageSource(photos), 0, 1, ViewPlan(VIEWS, ("embeddings",)))


def test_labels_are_cut_with_the_views(make_table: MakeTable, photos: Table) -> None:
    labels = (np.arange(52)[:, None] // 4 * 100 + np.arange(70) // 4).astype(np.uint16)
    rows = [{"image_id": i, "labels": pack_labels(labels), "count": 100} for i in range(20)]
    plan = ViewPlan((ViewSpec("v", 32, 2, (0.3, 1.0), flip_p=0.5, labels=True),), ("superpixels",))
    batch = batches(ImageSource(photos, superpixels=make_table("superpixels", rows)), 0, 1, plan)[0]
    found = batch.labels["v"]
    assert found.shape == (2, 8, 32, 32)
    assert found.dtype == torch.int64
    affine = batch.affines["v"]
    x = affine[..., 0, 0, None] * (torch.arange(32) + 0.5) + affine[..., 0, 2, None]
    y = affine[..., 1, 1, None] * (torch.arange(32) + 0.5) + affine[..., 1, 2, None]
    assert torch.equal(found, (y[..., None] // 4 * 100 + x[..., None, :] // 4).long())


def test_the_gpu_renderer_gives_the_same_batch(make_table: MakeTable) -> None:
    """Within the renderers' tolerance (test_renderers.py), with images of different sizes and neighbours."""
    images = make_table("images", [photo(i, 60 + 7 * i, 200 - 9 * i) for i in range(10)])
    table = make_table("neighbors", [{"image_id": i, "neighbors": [(i + 1) % 10]} for i in range(5)])
    plan = ViewPlan((*VIEWS, ViewSpec("neighbor", 32, of="neighbor")), ("neighbors",))
    cpu = batches(ImageSource(images, neighbors=table), 0, 2, plan)
    gpu = batches(ImageSource(images, neighbors=table), 0, 2, plan, renderer="gpu", device="cpu")
    for got, wanted in zip(gpu, cpu, strict=True):
        assert torch.equal(got.image_ids, wanted.image_ids)
        for name, view in wanted.views.items():
            assert torch.equal(got.affines[name], wanted.affines[name])
            error = (got.views[name] - view).abs() * 0.225 * 255
            assert error.mean() < 1.0, name
            assert torch.quantile(error, 0.99) <= 12, name
