"""Coupling and position bias as a stage: pictures, layers, encoders without either fault, bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.errors import SourceError, UsageError
from stages.data.units import keys_of, resample
from stages.evaluate.coupling_views import LayerEncoder, draw_pairs, pair_boxes, side_by_side, tile_boxes, tiled
from stages.evaluate.measure_coupling import MeasureCoupling
from stages.models.encoder import Encoder
from stages.models.feature_extractor import ObjectAwareFilter
from stages.models.settings import Backbone

from .conftest import RunStage
from .test_classify_objects import object_rows, store_images  # noqa: F401 - a fixture

SMALL: dict[str, Any] = {"tile": 16, "pairs": 12, "smallest": 16}


def test_a_row_a_layer_and_the_last_is_the_score(run: RunStage, store_images: Any) -> None:  # noqa: F811
    images = store_images(object_rows(36))
    outcome, made = run(MeasureCoupling, images=images, **SMALL)
    table = pq.read_table(made.local("part-00000.parquet")).to_pylist()
    assert [row["layer"] for row in table] == ["block_0"]
    assert outcome.notes == {"layer": "block_0"}
    for name in ("coupling_rate", "mean_cosine_similarity"):
        assert outcome.metrics[name] == pytest.approx(table[-1][name])
        assert outcome.metrics[name + "_random"] == pytest.approx(table[-1][name + "_random"])
    assert outcome.metrics["mean_cosine_similarity"] < 1 - 1e-4, "a ViT has positions"
    assert outcome.counts == {"pairs": 12, "skipped": 0, "unusable": 0}
    assert keys_of(made)[0].count("#") == 2
    drawn = resample(made, 200, 0)["coupling_rate"]
    assert drawn.min() <= outcome.metrics["coupling_rate"] <= drawn.max()
    assert made.read("preview.png").startswith(b"\x89PNG")


def test_where_nothing_couples_both_are_one() -> None:
    """Regions of 1 x 1 convolutions see neither their neighbours nor their place; those of 3 x 3 ones see both."""
    torch.manual_seed(0)
    encoder = Encoder.build(Backbone(name="resnet10t", kwargs={"stem_type": ""}))
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 255, (96, 96, 3)).astype(np.uint8) for _ in range(2))
    layers = LayerEncoder(encoder)
    together, alone = (layers([side_by_side(a, other)], pair_boxes(96)) for other in (b, None))
    grids = layers([tiled(a)], tile_boxes(96))
    assert list(together) == list(grids) == ["c1", "c2", "c3", "c4", "c5"]
    assert not torch.allclose(together["c5"][0, 0], alone["c5"][0, 0], rtol=1e-3)
    outer, middle = (
        torch.nn.functional.cosine_similarity(grids["c1"][0, [place]], grids["c1"][0, [4]]) for place in (0, 4)
    )
    assert outer < 1 - 1e-7
    assert middle == pytest.approx(1)
    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, torch.nn.Conv2d) and module.kernel_size[0] > 1:
                half = module.kernel_size[0] // 2
                kept = module.weight[:, :, half, half].clone()
                module.weight.zero_()[:, :, half, half] = kept
        encoder.model.maxpool = torch.nn.MaxPool2d(1, 2)
    together, alone = (layers([side_by_side(a, other)], pair_boxes(96)) for other in (b, None))
    for layer, both in together.items():
        torch.testing.assert_close(both[0, 0], alone[layer][0, 0], atol=1e-4, rtol=1e-3)


def test_a_region_is_the_mean_of_its_cells() -> None:
    torch.manual_seed(0)
    kwargs = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    encoder = Encoder.build(Backbone(name="vit_tiny_patch16_224", img_size=32, patch_size=8, kwargs=kwargs)).eval()
    tile = np.random.default_rng(1).integers(0, 255, (16, 16, 3)).astype(np.uint8)
    found = LayerEncoder(encoder)([side_by_side(tile, tile)], pair_boxes(16))
    with torch.inference_mode():
        pixels = torch.from_numpy(side_by_side(tile, tile)).permute(2, 0, 1)[None] / 255
        for i, map_BDhw in enumerate(encoder.levels(encoder.normalise(pixels), [0, 1])):
            expected = torch.stack([map_BDhw[0, :, 1:3, :2].mean(dim=(1, 2)), map_BDhw[0, :, 1:3, 2:].mean(dim=(1, 2))])
            torch.testing.assert_close(found[f"block_{i}"][0], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(map_BDhw, encoder(encoder.normalise(pixels)).map)


def test_other_backbones_and_filters_end_with_their_map() -> None:
    torch.manual_seed(0)
    tile = np.random.default_rng(1).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    other = Encoder.build(Backbone(name="efficientnet_lite0"))
    [(name, found)] = LayerEncoder(other)([side_by_side(tile, tile)], pair_boxes(64)).items()
    assert (name, found.shape) == ("map", (1, 2, other.width))
    kwargs = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    filtered = Encoder.build(Backbone(name="vit_tiny_patch16_224", img_size=32, patch_size=8, kwargs=kwargs))
    filtered.filter = ObjectAwareFilter(24, prototypes=4)
    found = LayerEncoder(filtered)([side_by_side(tile, tile)], pair_boxes(64))
    assert [(name, region.shape[2]) for name, region in found.items()] == [("block_0", 24), ("map", 48)]


def test_pictures_hold_their_tiles_where_the_boxes_say() -> None:
    left, right = np.full((16, 16, 3), 50, np.uint8), np.full((16, 16, 3), 90, np.uint8)
    seen = side_by_side(left, right)
    for tile, (x0, y0, x1, y1) in zip((left, right), pair_boxes(16).astype(int), strict=True):
        assert np.array_equal(seen[y0:y1, x0:x1], tile)
    assert int(seen.sum()) == 3 * 256 * 140, "the rest is black"
    assert not side_by_side(left, None)[:, 16:].any()
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    for x0, y0, x1, y1 in tile_boxes(16).astype(int):
        assert np.array_equal(tiled(ramp)[y0:y1, x0:x1], ramp)
    assert tile_boxes(16)[4].tolist() == [16, 16, 32, 32]


def test_pairs_are_of_two_classes_and_repeatable() -> None:
    labels = np.array([0, 0, 0, 1, 2])
    pairs = draw_pairs(labels, 50, 3)
    assert (labels[pairs[:, 0]] != labels[pairs[:, 1]]).all()
    assert np.array_equal(pairs, draw_pairs(labels, 50, 3))
    assert set(pairs.ravel().tolist()) == set(range(5))


def test_bad_input_is_named(run: RunStage, store_images: Any) -> None:  # noqa: F811
    images = store_images(object_rows(36))
    with pytest.raises(SourceError, match=r"of 24 objects, 0 are large enough\): lower stages\.eval\.smallest"):
        run(MeasureCoupling, images=images, **(SMALL | {"smallest": 60}))
    with pytest.raises(SourceError, match=r"no image of split 'test' .* has an object"):
        run(MeasureCoupling, images=images, fingerprint="m2", split="test", **SMALL)
    with pytest.raises(UsageError, match=r"stages\.eval\.tile: 20 pixels do not split into patches of 8"):
        run(MeasureCoupling, images=images, fingerprint="m3", **(SMALL | {"tile": 20}))
    broken = object_rows(36)
    broken[30]["image"] = b"no image"
    outcome, _ = run(MeasureCoupling, images=store_images(broken), fingerprint="m4", **(SMALL | {"pairs": 60}))
    assert [problem["key"] for problem in outcome.problems] == ["30.png"]
    assert outcome.counts["pairs"] < 60
