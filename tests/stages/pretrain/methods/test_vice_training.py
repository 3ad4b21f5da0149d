"""vice from a config: what it needs, two image sets with their own superpixels through the loop, a run cut in half."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.load import load_pipeline
from pipeline.errors import UsageError
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data.tables import pack_labels
from stages.models.encoder import Encoder
from stages.pretrain.config.pretrain import PretrainConfig
from stages.pretrain.launch.assemble import assemble
from stages.pretrain.methods.vice.regions import MASKED
from stages.regions.segments import grid_labels
from stages.training.checkpoint import CheckpointFolder
from stages.training.loop import train
from tests.conftest import ROOT, encode, smooth_pixels
from tests.stages.pretrain.conftest import SMALL
from tests.stages.pretrain.methods.runs import commit, run, run_whole_and_cut
from tests.stages.pretrain.methods.test_vice import SMALL as METHOD

CONFIG: dict[str, Any] = SMALL | {
    "images": [{"from": "scenes", "role": "scenes"}, {"from": "objects"}],
    "method": METHOD | {"name": "vice", "superpixels": ["scene_superpixels", "object_superpixels"]},
    "optimizer": {"name": "lars", "lr": 0.3, "decay_all": True, "weight_decay": 1e-6},
    "steps": 6,
    "checkpoint_every": 3,
}


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Artifact]:
    """Two sets of photographs with grids of different cells as superpixels."""
    store, found = ArtifactStore(str(tmp_path / "store")), {}
    for i, (width, height, cell) in enumerate([(48, 40, 8), (40, 56, 5)]):
        rows = [
            {"image_id": n, "key": f"{n}.jpg", "split": "train", "width": width, "height": height, "sha256": ""}
            | {"image": encode(smooth_pixels(width, height, n + 50 * i))}
            for n in range(12)
        ]
        images = commit(store, "images", str(i), rows)
        labels = grid_labels(height, width, cell).astype(np.uint16)
        packed = {"labels": pack_labels(labels), "count": int(labels.max()) + 1}
        made_from = {"images": f"images/{images.fingerprint}"}
        found[f"images.{i}.from"] = images
        found[f"method.superpixels.{i}"] = commit(
            store, "superpixels", str(i + 5), [{"image_id": n} | packed for n in range(12)], inputs=made_from
        )
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_image_sets_with_their_own_superpixels(inputs: dict[str, Artifact], tmp_path: Path, precision: str) -> None:
    config = CONFIG | {"precision": precision}
    progress, state = run(config, inputs, tmp_path / "run")
    row = progress.curves[-1]
    assert 0 < row["swapped"] < 10
    assert 0 < row["prototype_usage"] <= 1
    assert 0 < row["queue_filled"] <= 1
    torch.testing.assert_close(state["prototypes"].norm(dim=1), torch.ones(12))
    assert state["queue"].dtype == torch.float32
    sources = assemble(PretrainConfig.model_validate(config), inputs).data.chunks.reader.sources  # type: ignore[attr-defined]
    assert [source.superpixels.row(0)["count"] for source in sources] == [30, 88]


def test_a_run_cut_in_half_ends_as_one(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    whole, expected, resumed, state = run_whole_and_cut(CONFIG, inputs, tmp_path, at=5)
    assert [row["swapped"] for row in resumed.curves] == [row["swapped"] for row in whole.curves]
    assert state.keys() >= {"queue", "queue_filled", "prototypes"}
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


def test_accumulated_passes_fill_the_queue_like_one(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    """Two passes of two images: both are pushed, and the prototypes move once."""
    method = {**CONFIG["method"], "queue": {"size": 4000, "start": 100}}
    filled = []
    for accumulate in (1, 2):
        config = CONFIG | {"method": method, "steps": 1, "accumulate": accumulate}
        filled.append(int(run(config, inputs, tmp_path / str(accumulate))[1]["queue_filled"]))
    assert filled[0] == filled[1] > 0


def test_the_backbone_is_exported_without_the_decoder(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    finished = assemble(PretrainConfig.model_validate(CONFIG), inputs)
    train(finished, CheckpointFolder(tmp_path / "run", "f", say=print))
    encoder = finished.method.encoder().eval()
    encoder.save(tmp_path / "out", method="vice")
    loaded = Encoder.load(tmp_path / "out").eval()
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(image).map, encoder(image).map)
    assert not any("decoder" in key for key in loaded.state_dict())


def test_the_picture_of_the_views_shows_mutual_regions_and_masks(inputs: dict[str, Artifact]) -> None:
    config = CONFIG | {"method": CONFIG["method"] | {"mask": {"ratio": 0.5}}}
    made = assemble(PretrainConfig.model_validate(config), inputs)
    batch = next(made.data.batches(0, 1)).first(3)
    regions = batch.extras["regions"].transpose(0, 1).long()
    panels = made.method.preview_panels(batch)
    assert len(panels) == len(regions)
    assert (regions == MASKED).any()
    for panel, of_view, view in zip(panels, regions, batch.views["view"], strict=True):
        changed = (panel.view != view).any(1)
        assert torch.equal(changed, of_view == MASKED)  # noise on masked regions, nothing else changed
        assert torch.equal(panel.regions >= 0, of_view != -1)  # dark: what belongs to no mutual and no masked region
        assert torch.equal(panel.regions[of_view >= 0], of_view[of_view >= 0])


def test_missing_superpixels_are_named(inputs: dict[str, Artifact]) -> None:
    del inputs["method.superpixels.1"]
    with pytest.raises(UsageError, match="the method reads superpixels, and source 1 of images has none"):
        assemble(PretrainConfig.model_validate(CONFIG), inputs)


def test_the_proof_recipe_needs_superpixels_and_no_boxes(dev_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    stages = load_pipeline("configs/proof/vice.yaml").stages
    assert {stages[edge.stage].kind for edge in stages["vice"].edges} == {"images", "superpixels"}
    algorithms = {
        name: {stages[edge.stage].stage.config.algorithm for edge in stages[name].edges if "superpixels" in edge.path}
        for name in ("vice", "grid")
    }
    assert algorithms == {"vice": {"slic"}, "grid": {"grid"}}
