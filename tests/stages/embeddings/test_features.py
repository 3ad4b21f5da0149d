"""The features stage: every patch as the encoder gives it, in Parquet that pandas reads and that is read in place."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from pipeline.cli.export import copy_out
from pipeline.errors import UsageError
from pipeline.stage import Context
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data.images import decode
from stages.data.tables import SCHEMAS, Table
from stages.embeddings import features
from stages.embeddings.embedder import DenseEmbedder, fitted
from stages.embeddings.features import DenseFeatures
from stages.embeddings.settings import FeaturesConfig
from stages.models.encoder import Encoder
from stages.models.feature_extractor import ObjectAwareFilter
from stages.models.inference import Inference, squeeze
from stages.models.settings import Backbone
from tests.conftest import ROOT, encode, smooth_pixels

BACKBONE = Backbone(
    name="vit_tiny_patch16_224", img_size=32, patch_size=8, kwargs={"embed_dim": 24, "depth": 2, "num_heads": 2}
)


def config(**settings: Any) -> FeaturesConfig:
    given = {"images": "images", "backbone": BACKBONE.model_dump(), "size": 32}
    return FeaturesConfig.model_validate({**given, **settings})


@pytest.mark.slow
def test_every_patch_in_half_floats_with_its_images_key(
    ray_local: None,
    store: ArtifactStore,
    images: Callable[..., Artifact],
    context: Callable[..., Context],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = {f"{i:02d}.jpg": encode(smooth_pixels(60 + 4 * i, 40, i)) for i in range(14)}
    source = images({**files, "05.jpg": b"no image"}, [9, 5])
    torch.manual_seed(7)
    encoder = Encoder.build(BACKBONE)
    encoder.filter = ObjectAwareFilter(24, prototypes=4, heads=2)
    writer = store.begin("encoder", "e1")
    for file in encoder.save(writer.scratch):
        writer.put_file(file.name, file)
    ctx = context("features", images=source, encoder=writer.commit())
    monkeypatch.setattr(features, "_SHARD_BYTES", 4 * 2 * 48 * (1 + 4 * 4))  # four images

    outcome = DenseFeatures(config(backbone=None, encoder="warmup")).run(ctx)
    made = ctx.output.commit(uses="features")
    assert outcome.counts == {"images": 13, "failed": 1}
    assert [problem["key"] for problem in outcome.problems] == ["05.jpg"]
    assert outcome.notes == {"vector_width": 48, "width": 48}
    assert [shard.rows for shard in made.shards()] == [3, 2, 3, 2, 3], "9 and 5 images, no more than four in a shard"
    assert made.read("preview.png").startswith(b"\x89PNG")

    copy_out(made, tmp_path / "features")
    frame, table = pd.read_parquet(tmp_path / "features"), Table.open(made)
    assert frame["image_id"].tolist() == [i for i in range(14) if i != 5]
    for row in frame.itertuples():
        assert row.key == f"{row.image_id:02d}.jpg"
        alone = Inference(encoder)([squeeze(decode(files[row.key]), 32, 32)])
        patches = row.patches.reshape(row.grid_height, row.grid_width, -1)
        assert patches.dtype == row.vector.dtype == np.float16
        np.testing.assert_allclose(patches, alone.map[0].permute(1, 2, 0), atol=4e-3)
        np.testing.assert_allclose(row.vector, alone.vector[0], atol=4e-3)
        mapped = table.row(row.image_id)
        assert mapped["key"] == row.key
        assert np.array_equal(mapped["patches"], row.patches)
        assert not mapped["patches"].flags.owndata, "a view of the mapped file"

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    in_pandas, in_place = (code for code in blocks if "patches" in code)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "features").rename(tmp_path / "patches")
    exec(in_pandas, {})
    assert "13.jpg (48,) (4, 4, 48)" in capsys.readouterr().out
    names: dict[str, Any] = {}
    exec(in_place.replace(".tessera/store", store.address).replace("FINGERPRINT", made.fingerprint), names)
    assert np.array_equal(names["patches"], frame.set_index("image_id")["patches"][7])


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({}, (32, 32)),
        ({"fit": "centre"}, (32, 32)),
        ({"fit": "aspect"}, (24, 48)),
        ({"fit": "aspect", "size": 4}, (8, 8)),
    ],
)
def test_fit(settings: dict[str, Any], shape: tuple[int, int]) -> None:
    pixels = fitted(smooth_pixels(100, 40), config(**settings), stride=8)
    assert pixels.shape == (*shape, 3)
    [row] = DenseEmbedder(BACKBONE, config())([{"key": "a", "pixels": pixels}])
    assert isinstance(row, dict)
    assert (row["grid_height"], row["grid_width"]) == (shape[0] // 8, shape[1] // 8)
    assert len(row["patches"]) == shape[0] * shape[1] // 64 * 24


def test_a_layer_and_its_mean() -> None:
    embedder = DenseEmbedder(BACKBONE, config(layer=0))
    pixels = [smooth_pixels(32, 32, 1), smooth_pixels(48, 32, 2), smooth_pixels(32, 32, 3)]
    rows = embedder([{"key": str(i), "pixels": each} for i, each in enumerate(pixels)])
    for row, each in zip(rows, pixels, strict=True):
        [[map_Dhw]] = embedder.inference.encoder.levels(
            embedder.inference.encoder.normalise(torch.from_numpy(each).permute(2, 0, 1)[None] / 255), [0]
        )
        assert isinstance(row, dict)
        np.testing.assert_allclose(row["patches"], map_Dhw.permute(1, 2, 0).flatten().detach(), atol=4e-3)
        np.testing.assert_allclose(row["vector"], map_Dhw.mean((1, 2)).detach(), atol=4e-3)


def test_features_that_half_floats_cannot_hold_are_a_problem_of_their_image() -> None:
    embedder = DenseEmbedder(BACKBONE, config())
    embedder.inference.encoder.model.norm.bias.data.fill_(1e6)
    [row] = embedder([{"key": "a", "pixels": smooth_pixels(32, 32)}])
    assert isinstance(row, OverflowError)
    assert "65504" in str(row)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": 30}, "stages.mine.size: 30 pixels do not split into patches of 8: set it to 24 or 32"),
        ({"layer": 7}, "stages.mine.layer: the encoder has no layer 7"),
    ],
)
def test_what_the_encoder_does_not_have_is_refused_before_a_worker_starts(settings: dict[str, int], words: str) -> None:
    chosen = config(**settings)
    with pytest.raises(UsageError, match=words):
        DenseFeatures(chosen)._try_out("mine", DenseEmbedder(BACKBONE, chosen))


READER = """
import sys
from pipeline.store.artifact import Artifact
from stages.data.tables import Table

def private() -> int:
    [line] = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
    return int(line.split()[1]) >> 10

before, most, total = private(), 0, 0
table = Table.open(Artifact.open(sys.argv[1], "features", "f1"))
for image_id in table.ids:
    row = table.row(image_id)
    assert row["patches"].max() == 63
    total += row["patches"].nbytes
    most = max(most, private() - before)
print(total, most)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_private_memory_of_a_reader_does_not_grow_with_the_set(store: ArtifactStore) -> None:
    writer = store.begin("features", "f1")
    patches = np.tile(np.arange(64, dtype=np.float16), 100 * 100 * 12)  # 15 MB an image, 384 MB in all
    row = {"key": "a", "vector": np.zeros(4, np.float16), "patches": patches, "grid_height": 100, "grid_width": 100}
    five = pa.Table.from_pylist([{"image_id": 0, **row}] * 5, schema=SCHEMAS["features"])
    for shard in range(5):
        writer.put_table(shard, five.set_column(0, "image_id", pa.array(range(5 * shard, 5 * shard + 5))))
    writer.commit()
    done = subprocess.run([sys.executable, "-c", READER, store.address], capture_output=True, text=True, check=True)
    total, most = map(int, done.stdout.split())
    assert total > 360 << 20, "all of it was read"
    assert most < 260, (
        "MB beyond what the imports took: a row group of 64 MB in the making of the copy, some times over"
    )
