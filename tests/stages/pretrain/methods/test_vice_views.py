"""Views of vice: regions have one name in all views, masks, contents, and images that cannot be used."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipeline.errors import SourceError
from pipeline.store.store import ArtifactStore
from stages.data.tables import SCHEMAS, Table, pack_labels
from stages.pretrain.data.loader import ImageSource, TrainData
from stages.pretrain.methods.vice.regions import MASKED, square_frame
from stages.pretrain.methods.vice.views import NO_MUTUAL_REGION, view_plan
from stages.pretrain.views import render_cpu, render_gpu
from stages.pretrain.views.draw import generator
from stages.pretrain.views.geometry import apply, rectangle
from stages.pretrain.views.plan import ImageRow
from stages.pretrain.views.render_cpu import cut_labels
from stages.regions.segments import grid_labels
from tests.conftest import encode, smooth_pixels
from tests.stages.pretrain.methods.test_vice import build, drawn, image_row, settings


def test_equal_numbers_are_equal_regions_in_every_view() -> None:
    config, labels = settings(flip=0.5), np.random.default_rng(0).permutation(88)[grid_labels(48, 64, 6)]
    flips = set()
    for image_id in range(20):
        item = drawn(config, image_row(image_id, labels=labels.astype(np.int32)))
        maps, count = item.extras["regions"], int(item.extras["count"])
        named: dict[int, set[int]] = {}
        for map_, view in zip(maps, item.draws, strict=True):
            assert set(np.unique(map_[map_ >= 0])) == set(range(count))
            y, x = np.nonzero(map_ >= 0)
            points = np.floor(apply(view.affine, np.stack([x + 0.5, y + 0.5], 1).astype(float))).astype(int)
            for number, (px, py) in zip(map_[y, x].tolist(), points.tolist(), strict=True):
                named.setdefault(number, set()).add(int(labels[py, px]))
            flips.add(bool(view.affine[0, 0] < 0))
        assert all(len(ids) == 1 for ids in named.values())
        assert [min(named[n]) for n in range(count)] == sorted(min(ids) for ids in named.values())
    assert flips == {True, False}


def test_every_view_shows_the_middle_of_the_first_and_lies_in_the_image() -> None:
    config = settings(resize=(0.5, 1.5), size=32)
    for image_id in range(30):
        views = [rectangle(view.affine, 32) for view in drawn(config, image_row(image_id)).draws]
        middle = (views[0][:2] + views[0][2:]) / 2
        for rect in views:
            assert (rect[:2] <= middle).all()
            assert (rect[2:] >= middle).all()
            assert (rect >= 0).all()
            assert (rect[2:] <= (64, 48)).all()


def test_masked_regions_count_in_no_view() -> None:
    config = settings(mask={"ratio": 1.0, "protected": 0.5})
    labels = grid_labels(48, 64, 6)
    seen = 0
    for image_id in range(20):
        item = drawn(config, image_row(image_id))
        if item.skipped:
            continue
        hidden, used = set(), set()
        for map_, view in zip(item.extras["regions"], item.draws, strict=True):
            grid = np.stack(np.meshgrid(np.arange(32) + 0.5, np.arange(32) + 0.5), -1).reshape(-1, 2)
            px, py = np.floor(apply(view.affine, grid)).astype(int).T
            flat = map_.ravel()
            hidden |= set(labels[py[flat == MASKED], px[flat == MASKED]].tolist())
            used |= set(labels[py[flat >= 0], px[flat >= 0]].tolist())
        assert not hidden & used
        seen += len(hidden)
    assert seen > 100
    plain = drawn(settings(mask={"ratio": 0.0}), image_row())
    assert not (plain.extras["regions"] == MASKED).any()


def test_draws_follow_their_generator_and_travel() -> None:
    config = settings()
    plan = pickle.loads(pickle.dumps(view_plan(config)))
    row = image_row(3)
    again = plan.drawer(generator(5, 0, 0, 3), row)
    np.testing.assert_array_equal(again.extras["regions"], drawn(config, row).extras["regions"])
    other = drawn(config, row, seed=6)
    assert [d.affine.tolist() for d in other.draws] != [d.affine.tolist() for d in again.draws]


def test_centres_follow_the_content() -> None:
    """Left half flat, right half striped: views gather on the right."""
    pixels = np.full((200, 400, 3), 128, np.uint8)
    pixels[:, 200::8] = 0
    labels = grid_labels(200, 400, 10)
    config = settings(resize=(1.0, 1.0))
    middles = []
    for image_id in range(40):
        first = drawn(config, ImageRow(image_id, 400, 200, lambda: pixels, superpixels=labels)).draws[0]
        middles.append(float(rectangle(first.affine, 32)[[0, 2]].mean()))
    assert np.mean(np.array(middles) > 190) > 0.9


@pytest.mark.parametrize("standard", [{"kind": "pad", "size": 100}, {"kind": "square", "size": 40}])
@pytest.mark.parametrize("shape", [(20, 12), (300, 2), (1, 1), (64, 48), (50, 130)])
def test_an_image_of_any_size_has_views(standard: dict[str, Any], shape: tuple[int, int]) -> None:
    """Smaller than a view, or narrower: the rest is outside, and no region is there."""
    width, height = shape
    config = settings(standard=standard, mask={"ratio": 0.0})
    items = [drawn(config, image_row(image_id, width, height)) for image_id in range(1, 5)]
    assert {item.skipped for item in items} <= {None, NO_MUTUAL_REGION}
    usable = [item for item in items if item.skipped is None]
    assert len(usable) >= 3
    for item in usable:
        for map_, view in zip(item.extras["regions"], item.draws, strict=True):
            y, x = np.nonzero(map_ >= 0)
            points = apply(view.affine, np.stack([x + 0.5, y + 0.5], 1).astype(float))
            assert len(points) > 0
            assert (points >= 0).all()
            assert (points <= (width, height)).all()


def test_views_of_the_square_frame_show_nothing_outside_of_it() -> None:
    """A view may be larger than the frame: 320 of 640 x 480 pixels, the low-resolution recipe."""
    config = settings(
        standard={"kind": "square", "size": 320}, size=256, resize=(0.5, 2.0), views=5, mask={"ratio": 0.0}, flip=0.5
    )
    x0, y0, x1, y1 = square_frame(640, 480, 320).seen(640, 480)
    assert (x1 - x0, y0, y1) == (480, 0, 480)
    assert abs(x0 + x1 - 640) <= 2
    pixels = smooth_pixels(640, 480, 1)
    pixels[..., 0] = 0
    pixels[100:300:7, 100:540:9] = 0
    pixels[:, :x0] = pixels[:, x1:] = (255, 0, 0)  # outside of the frame
    labels = np.arange(640 * 480, dtype=np.int32).reshape(480, 640)  # every pixel has its own
    reaching = 0
    for image_id in range(40):
        row = ImageRow(image_id, 640, 480, lambda: pixels, superpixels=labels)
        draws = drawn(config, row).draws
        for item in draws:
            left, _, right, _ = rectangle(item.affine, 256)
            reaching += bool(left < x0 or right > x1)
            found = cut_labels(labels, item)
            columns = found[found >= 0] % 640
            assert x0 <= columns.min() <= columns.max() < x1
        if image_id < 8:
            plain = [replace(item, colour={}) for item in draws]
            gpu = render_gpu.render(torch.from_numpy(pixels)[None], [(480, 640)], plain, [0] * len(draws), [1])
            for item, theirs in zip(plain, gpu, strict=True):
                mine = render_cpu.render(pixels, item)
                black = cut_labels(labels, item) < 0
                assert mine[..., 0].max() == theirs[0].max() == 0
                assert mine[cv2.erode(black.astype(np.uint8), np.ones((3, 3))) > 0].sum() == 0
    assert reaching > 60  # of 200 views


def test_pixels_as_regions() -> None:
    config = settings(superpixels=None, decomposition="pixels", mask={"ratio": 0.25})
    plan = view_plan(config)
    assert plan.tables == ()
    assert view_plan(settings()).tables == ("superpixels",)
    row = image_row(2)
    row.superpixels = None
    item = drawn(config, row)
    assert int(item.extras["count"]) > 20
    first = item.extras["regions"][0]
    assert len(np.unique(first[first >= 0])) == int(item.extras["count"])


def test_region_zero_can_be_dropped() -> None:
    one = np.zeros((48, 64), np.int32)
    assert drawn(settings(mask={"ratio": 0.0}), image_row(labels=one)).skipped is None
    assert (
        drawn(settings(mask={"ratio": 0.0}, drop_region_zero=True), image_row(labels=one)).skipped == NO_MUTUAL_REGION
    )


# --------------------------------------------------------------------------------------------- images that do not fit
def make_sources(folder: Path, rows: list[dict[str, Any]], maps: dict[int, np.ndarray]) -> ImageSource:
    store = ArtifactStore(str(folder))

    def table(kind: str, fingerprint: str, content: list[dict[str, Any]]) -> Table:
        writer = store.begin(kind, fingerprint)
        full = [dict.fromkeys(SCHEMAS[kind].names) | row for row in content]
        writer.put_table(0, pa.Table.from_pylist(full, schema=SCHEMAS[kind]))
        return Table.open(writer.commit())

    packed = [
        {"image_id": i, "labels": pack_labels(map_.astype(np.uint16)), "count": int(map_.max()) + 1}
        for i, map_ in sorted(maps.items())
    ]
    return ImageSource(table("images", "0" * 24, rows), superpixels=table("superpixels", "1" * 24, packed))


def photo(image_id: int, width: int = 64, height: int = 48, mode: str = "RGB") -> dict[str, Any]:
    picture = Image.fromarray(smooth_pixels(width, height, image_id)).convert(mode)
    row = {"image_id": image_id, "key": f"{image_id}.png", "image": encode(picture, "PNG")}
    return row | {"width": width, "height": height}


def test_images_that_cannot_be_used_are_replaced_and_counted(tmp_path: Path) -> None:
    config = settings(mask={"ratio": 0.0}, drop_region_zero=True)
    maps = {i: grid_labels(48, 64, 6) for i in range(6)}
    maps[2] = np.zeros((48, 64), np.int32)  # its one region is dropped: no mutual region
    maps[4] = grid_labels(20, 24, 6)
    del maps[5]
    rows = [photo(i) for i in range(4)] + [photo(4, 24, 20, "L"), photo(5)]
    data = TrainData([make_sources(tmp_path, rows, maps)], view_plan(config), global_batch=6, seed=0)
    [batch] = list(data.batches(0, 1))
    assert not set(batch.image_ids.tolist()) & {2, 5}
    assert 4 in batch.image_ids.tolist()  # grey, and smaller than a view
    assert batch.skipped[NO_MUTUAL_REGION] >= 1
    assert batch.skipped["no superpixels"] >= 1
    assert batch.problems["2.png"] == NO_MUTUAL_REGION
    assert batch.views["view"].shape == (3, 6, 3, 32, 32)
    method = build(mask={"ratio": 0.0}, drop_region_zero=True)
    assert torch.isfinite(method(batch)["swapped"])


def test_no_usable_image_at_all_stops_the_run(tmp_path: Path) -> None:
    config = settings(mask={"ratio": 0.0}, drop_region_zero=True)
    source = make_sources(tmp_path, [photo(0), photo(1)], {i: np.zeros((48, 64), np.int32) for i in range(2)})
    with pytest.raises(SourceError, match=NO_MUTUAL_REGION):
        list(TrainData([source], view_plan(config), global_batch=2, seed=0).batches(0, 1))
