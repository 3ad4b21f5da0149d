"""K-NN of objects: regions against another RoIAlign, the bank's balance, replaced surroundings, bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from pipeline.errors import SourceError
from pipeline.stage import Feed
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data.images import encode_png
from stages.data.tables import SCHEMAS
from stages.data.units import resample
from stages.evaluate.classify_objects import ClassifyObjects, ClassifyObjectsConfig
from stages.evaluate.object_bank import SplitObjects, balanced
from stages.evaluate.object_vectors import ObjectEncoder, ObjectView, disturb, keep_aspect
from stages.models.encoder import Encoder
from stages.models.settings import Backbone
from stages.pretrain.losses.roi_align import roi_align_regions
from tests.golden.golden import tensors

from .conftest import COLOURS, RunStage

SMALL: dict[str, Any] = {"size": 64, "k": 5, "per_class": 20, "random_baseline": False}


def object_rows(count: int) -> list[dict[str, Any]]:
    """Images of 96x64 in grey noise with an object of one colour at the left and one of any at the right."""
    rows = []
    for i in range(count):
        generator = np.random.default_rng(i)
        pixels = generator.integers(60, 190, (64, 96, 3))
        objects = []
        for place, label in enumerate((i % 3, int(generator.integers(3)))):
            x, y = 4 + 48 * place + int(generator.integers(8)), int(generator.integers(20))
            pixels[y : y + 40, x : x + 36] = COLOURS[label] + generator.integers(-20, 20, (40, 36, 3))
            box = [float(x), float(y), x + 36.0, y + 40.0]
            objects.append({"box": box, "category": "rgb"[label], "category_id": label, "crowd": False, "mask": None})
        row: dict[str, Any] = dict.fromkeys(SCHEMAS["images"].names)
        row |= {"image_id": i, "key": f"{i:02d}.png", "width": 96, "height": 64, "objects": objects, "sha256": ""}
        rows.append(row | {"image": encode_png(pixels.astype(np.uint8)), "split": "train" if i < 24 else "val"})
    return rows


@pytest.fixture
def store_images(store: ArtifactStore) -> Any:
    def put(rows: list[dict[str, Any]]) -> Artifact:
        writer = store.begin("images", f"objects{len(rows)}-{id(rows)}")
        writer.put_table(0, pa.Table.from_pylist(rows, schema=SCHEMAS["images"]))
        return writer.commit(notes={"classes": ["red", "green", "blue"]})

    return put


def test_objects_are_known_by_their_boxes(run: RunStage, store_images: Any) -> None:
    outcome, made = run(ClassifyObjects, images=store_images(object_rows(36)), **(SMALL | {"random_baseline": True}))
    assert outcome.metrics["top1"] > 90
    assert {"top1_random", "top5_random"} < set(outcome.metrics)
    assert outcome.counts["test"] == 24
    assert outcome.counts["images"] == 12
    table = pq.read_table(made.local("part-00000.parquet")).to_pylist()
    assert [row["object"] for row in table[:4]] == [0, 1, 0, 1]
    right = [row["label"] == row["prediction"] for row in table]
    assert [row["rank"] == 0 for row in table] == right
    assert 100 * np.mean(right) == pytest.approx(outcome.metrics["top1"])
    assert resample(made, 200, 0)["top1"].mean() == pytest.approx(outcome.metrics["top1"], abs=5)
    assert made.read("preview.png").startswith(b"\x89PNG")


def test_surroundings_are_replaced_for_queries_or_for_both(run: RunStage, store_images: Any) -> None:
    images = store_images(object_rows(36))
    ranks = {}
    for which in ("none", "queries", "both"):
        outcome, made = run(ClassifyObjects, images=images, fingerprint=which, disturbed=which, **SMALL)
        assert outcome.metrics["top1"] > 70, "the object itself is as it was"
        ranks[which] = pq.read_table(made.local("part-00000.parquet")).column("object").to_pylist()
    assert ranks["none"] == ranks["queries"] == ranks["both"]


def test_only_the_box_of_a_disturbed_image_is_its_own() -> None:
    own, other = np.full((32, 48, 3), 200, np.uint8), np.full((10, 10, 3), 30, np.uint8)
    seen = disturb(own, np.array([7.5, 4.0, 20.0, 40.0], np.float32), other)
    inside = np.zeros((32, 48), bool)
    inside[4:32, 7:20] = True
    assert (seen[inside] == 200).all()
    assert (seen[~inside] == 30).all()
    assert (disturb(own, np.array([48.0, 32.0, 48.0, 32.0], np.float32), other)[31, 47] == 200).all()


def test_an_image_keeps_its_aspect_in_whole_patches() -> None:
    assert keep_aspect(np.zeros((100, 200, 3), np.uint8), 112, 16).shape == (80, 160, 3)


class GivenMap(torch.nn.Module):
    """Stands in for an encoder: whatever the image, its map is the golden one."""

    is_resnet, stride = False, 16

    def __init__(self, map_BDhw: torch.Tensor) -> None:
        super().__init__()
        self.map = map_BDhw.float()

    def normalise(self, image: torch.Tensor) -> torch.Tensor:
        return image

    def forward(self, image: torch.Tensor) -> Any:
        return self


def test_regions_are_those_of_the_golden_roi_align() -> None:
    golden = tensors("roi_align")
    encoder: Any = GivenMap(golden["x"])
    views = [
        ObjectView(np.zeros((224, 224, 3), np.uint8), [0, 1], (boxes * 16).float().numpy()) for boxes in golden["boxes"]
    ]
    found = ObjectEncoder(encoder, pool_from="c4", size=7, precision="fp32")(views)
    expected = functional.normalize(golden["out7"].mean(dim=(2, 3)).float(), dim=1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_resnet_pools_c4_and_goes_on_to_c5() -> None:
    torch.manual_seed(0)
    encoder = Encoder.build(Backbone(name="resnet10t")).eval()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 96, 3)).astype(np.uint8)
    boxes = np.array([[8, 8, 72, 60], [40, 0, 96, 64]], np.float32)
    found = ObjectEncoder(encoder, pool_from="c4", size=7, precision="fp32")([ObjectView(pixels, [0, 1], boxes)])
    with torch.inference_mode():
        c4 = encoder.stem_to_c4(encoder.normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255))
        regions = roi_align_regions(c4, torch.from_numpy(boxes)[None] / 16, size=7)
        expected = functional.normalize(encoder.c5(regions).mean(dim=(2, 3)), dim=1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    other = ObjectEncoder(encoder, pool_from="map", size=7, precision="fp32")([ObjectView(pixels, [0, 1], boxes)])
    assert (found - other).abs().max() > 1e-4


def test_other_backbones_pool_their_map() -> None:
    torch.manual_seed(0)
    encoder = Encoder.build(Backbone(name="efficientnet_lite0"))
    view = ObjectView(np.zeros((64, 96, 3), np.uint8), [0], np.array([[8, 8, 72, 60]], np.float32))
    found = ObjectEncoder(encoder, pool_from="c4", size=7, precision="bf16")([view])
    assert found.shape == (1, encoder.width)
    assert found.norm() == pytest.approx(1)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=40), st.integers(0, 9))
def test_the_bank_is_balanced(pairs: list[tuple[int, int]], seed: int) -> None:
    pairs = sorted(pairs)
    images, labels = np.array(pairs, np.int64).T
    objects = SplitObjects(images, np.arange(len(pairs)), labels, np.zeros((len(pairs), 4), np.float32), {})
    bank = balanced(objects, per_image=2, per_class=3, seed=seed)
    assert np.bincount(bank.images).max() <= 2
    assert np.bincount(bank.labels).max() <= 3
    assert sorted(set(bank.places.tolist())) == bank.places.tolist(), "in order, none twice"
    thinned = balanced(objects, per_image=2, per_class=10**6, seed=seed)
    counts = np.bincount(thinned.labels, minlength=4)
    assert np.array_equal(np.bincount(bank.labels, minlength=4), np.minimum(counts, 3)), "as many as there are"
    even = np.bincount(balanced(objects, per_image=2, per_class=None, seed=seed).labels, minlength=4)
    assert set(even.tolist()) <= {0, int(counts[counts > 0].min())}
    assert len(balanced(objects, per_image=None, per_class=10**6, seed=seed)) == len(pairs)


def test_crowds_and_unreadable_images_take_no_part(run: RunStage, store_images: Any) -> None:
    rows = object_rows(36)
    rows[30]["objects"][0]["crowd"] = True
    rows[31]["image"] = b"no image"
    outcome, made = run(ClassifyObjects, images=store_images(rows), **SMALL)
    assert outcome.counts["test"] == 24 - 1 - 2
    assert [problem["key"] for problem in outcome.problems] == ["31.png"]
    table = pq.read_table(made.local("part-00000.parquet")).to_pylist()
    assert [row["object"] for row in table if row["image_id"] == 30] == [1]


def test_bad_input_is_named(run: RunStage, store_images: Any, capsys: pytest.CaptureFixture[str]) -> None:
    images = store_images(object_rows(36))
    with pytest.raises(SourceError, match=r"k is 70, but only 45 .* vote: set stages\.eval\.k to 45 or less"):
        run(ClassifyObjects, images=images, **(SMALL | {"k": 70, "per_class": 15}))
    with pytest.raises(SourceError, match=r"no image of split 'test' .* has an object with a class"):
        run(ClassifyObjects, images=images, fingerprint="m2", test_split="test", **SMALL)
    one = object_rows(26)
    for row in one[:24]:
        for each in row["objects"]:
            each["category_id"] = 1
    with pytest.raises(SourceError, match="all objects of split 'train' are of one class, green"):
        run(ClassifyObjects, images=store_images(one), fingerprint="m3", **SMALL)
    alone = object_rows(25)
    with pytest.raises(SourceError, match=r"split 'val' has one image, .* set stages\.eval\.disturbed to none"):
        run(ClassifyObjects, images=store_images(alone), fingerprint="m4", disturbed="queries", **SMALL)
    unseen = object_rows(36)
    for row in unseen[:24]:
        for each in row["objects"]:
            each["category_id"] = min(each["category_id"], 1)
    capsys.readouterr()
    outcome, _ = run(ClassifyObjects, images=store_images(unseen), fingerprint="m5", **SMALL)
    blue = sum(each["category_id"] == 2 for row in unseen[24:] for each in row["objects"])
    assert f"{blue} of 24 test objects cannot be right" in capsys.readouterr().out
    assert outcome.metrics["top1"] <= 100 * (1 - blue / 24) + 1e-6


def test_images_without_boxes_are_refused_when_planning() -> None:
    config = ClassifyObjectsConfig.model_validate({"images": "i", "encoder": "e", "disturbed": "queries"})
    there = {"images": 5, "masks": 0, "objects": 9, "labels": 0}

    def asked(counts: dict[str, int], val: dict[str, int]) -> list[str]:
        feed = Feed("i", "images", "1", {}, config, counts, {"contents": {"train": there, "val": val}})
        return [f"{path}: {what}" for path, what, _ in ClassifyObjects(config).mismatches({"images": feed})]

    assert asked({"images": 10, "objects": 18}, there) == []
    assert asked({"images": 10, "objects": 0}, there)[0].startswith("images: i has no objects")
    assert asked({"images": 10, "objects": 9}, there | {"objects": 0}) == [
        "test_split: no image of split 'val' of i has an object box"
    ]
    [line] = asked({"images": 6, "objects": 10}, there | {"images": 1})
    assert line.startswith("disturbed: split 'val' of i has one image")
