"""An `images` artifact of small made-up photographs, and a context to run the pre-train stage in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.stage import Context, Outcome
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data.tables import SCHEMAS
from stages.pretrain.stage import Pretrain, PretrainConfig
from tests.conftest import encode, smooth_pixels

SMALL = {
    "images": "images",
    "backbone": {
        "name": "vit_tiny_patch16_224",
        "img_size": 32,
        "patch_size": 8,
        "kwargs": {"depth": 2, "embed_dim": 32, "num_heads": 2},
    },
    "method": {
        "name": "dino",
        "global_crops": {"size": 32, "count": 2, "scale": [0.4, 1.0]},
        "local_crops": {"size": 16, "count": 2, "scale": [0.05, 0.4]},
        "head": {"prototypes": 32, "hidden": 32, "bottleneck": 16},
    },
    "batch_size": 4,
    "log_every": 1,
    "loader_workers": 0,
}


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "store"))


def write_photographs(store: ArtifactStore, fingerprint: str, unreadable: Collection[int] = ()) -> Artifact:
    """24 photographs of 48x40, in two shards; those in `unreadable` are cut short."""
    writer = store.begin("images", fingerprint)
    for shard in range(2):
        rows = []
        for i in range(shard * 12, shard * 12 + 12):
            row = dict.fromkeys(SCHEMAS["images"].names) | {"image_id": i, "key": f"{i:03d}.jpg", "split": "train"}
            image = encode(smooth_pixels(48, 40, i))[: 200 if i in unreadable else None]
            rows.append(row | {"image": image, "width": 48, "height": 40, "sha256": ""})
        writer.put_table(shard, pa.Table.from_pylist(rows, schema=SCHEMAS["images"]))
    return writer.commit()


@pytest.fixture
def images(store: ArtifactStore) -> Artifact:
    """24 photographs, all of them readable."""
    return write_photographs(store, "0" * 24)


RunStage = Callable[..., tuple[Outcome, Artifact]]


@pytest.fixture
def run_stage(store: ArtifactStore, images: Artifact) -> RunStage:
    """`run_stage(fingerprint, {"steps": 4, ...}, on_row)` runs the stage and commits its artifact.

    Further inputs go by their field: `run_stage(..., init=encoder)`, `**{"continue": encoder}`.
    """

    def run(
        fingerprint: str,
        settings: Mapping[str, Any],
        on_row: Callable[[Mapping[str, float], int], None] = lambda metrics, step: None,
        trained_on: Artifact = images,
        say: Callable[[str], None] = print,
        show: Callable[[str], None] = lambda text: None,
        **more: Artifact,
    ) -> tuple[Outcome, Artifact]:
        config = PretrainConfig.model_validate({**SMALL, **settings})
        output = store.begin("encoder", fingerprint)
        inputs = {"images": trained_on, **more}
        told = {"log_metrics": on_row, "show_figures": show, "say": say}
        context = Context("train", fingerprint, inputs, output, config.resources, **told)
        outcome = Pretrain(config).run(context)
        return outcome, output.commit(
            stage="train",
            metrics=outcome.metrics,
            counts=outcome.counts,
            notes=outcome.notes,
            preview=outcome.preview,
        )

    return run
