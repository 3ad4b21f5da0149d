"""d3ssl from a config: what it needs, two image sets with their own boxes through the loop, and a run cut in half."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.load import load_pipeline
from pipeline.errors import UsageError
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.pretrain.config.pretrain import PretrainConfig
from stages.pretrain.launch.assemble import assemble
from tests.conftest import ROOT, encode, smooth_pixels
from tests.stages.pretrain.conftest import SMALL
from tests.stages.pretrain.methods.runs import commit, run, run_whole_and_cut
from tests.stages.pretrain.methods.test_d3ssl import SMALL as METHOD

CONFIG: dict[str, Any] = SMALL | {
    "images": [{"from": "scenes", "role": "scenes"}, {"from": "objects"}],
    "method": METHOD | {"name": "d3ssl", "boxes": ["scene_boxes", "object_boxes"]},
    "optimizer": {"name": "sgd", "lr": 0.05},
    "steps": 6,
    "checkpoint_every": 3,
}


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Artifact]:
    """Two sets of photographs; every third image of the second has no boxes."""
    store, found = ArtifactStore(str(tmp_path / "store")), {}
    for i, (width, height) in enumerate([(48, 40), (40, 56)]):
        rows = [
            {"image_id": n, "key": f"{n}.jpg", "split": "train", "width": width, "height": height, "sha256": ""}
            | {"image": encode(smooth_pixels(width, height, n + 50 * i))}
            for n in range(12)
        ]
        images = commit(store, "images", str(i), rows)
        boxes = [[4.0, 4, 28, 30], [10, 12, 36, 38], [0, 0, 20, 20]]
        table = [{"image_id": n, "boxes": [] if i and n % 3 == 0 else boxes} for n in range(12)]
        found[f"images.{i}.from"] = images
        made_from = {"images": f"images/{images.fingerprint}"}
        found[f"method.boxes.{i}"] = commit(store, "boxes", str(i + 5), table, inputs=made_from)
    return found


def test_each_image_set_brings_its_own_boxes(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    progress, state = run(CONFIG, inputs, tmp_path / "run")
    row = progress.curves[-1]
    assert row["deposition"] > 0
    assert 0 < row["images_without_boxes"] < 12  # of the second set only, which half of the batch is from
    assert int(state["bank_filled"]) == 64
    halves = assemble(PretrainConfig.model_validate(CONFIG), inputs)
    sources = halves.data.chunks.reader.sources  # type: ignore[attr-defined]
    assert [len(source.boxes.row(0)["boxes"]) for source in sources] == [3, 0]


def test_a_run_cut_in_half_ends_as_one(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    whole, expected, resumed, state = run_whole_and_cut(CONFIG, inputs, tmp_path, at=5)
    assert [row["decouple"] for row in resumed.curves] == [row["decouple"] for row in whole.curves]
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


def test_the_picture_of_the_views_shows_proposals_and_cut_outs(inputs: dict[str, Artifact]) -> None:
    """The panels are what the encoder is given, whose values are tested above, and the boxes that are pooled."""
    made = assemble(PretrainConfig.model_validate(CONFIG), inputs)
    batch = next(made.data.batches(0, 1)).first(3)
    one, two, small, pasted = made.method.preview_panels(batch)
    size = batch.views["whole"].shape[-1]
    assert [len(panel.view) for panel in (one, two, small, pasted)] == [3] * 4
    hidden = (one.view == made.method.settings.fill).all(1)  # type: ignore[union-attr]
    assert hidden.any()
    assert not hidden.all()
    assert torch.equal(two.view, batch.views["crop"][0])
    for panel, boxes in zip((one, two, small, pasted), batch.extras["boxes"].unbind(1), strict=True):
        assert torch.equal(panel.boxes, boxes)
    assert small.view.shape[-1] < size == pasted.view.shape[-1]
    assert not torch.equal(pasted.view, batch.views["crop"][0])
    alone = {**CONFIG, "method": CONFIG["method"] | {"weights": {"deposition": 0}}}
    fewer = assemble(PretrainConfig.model_validate(alone), inputs).method.preview_panels(batch)
    assert len(fewer) == 3


def test_missing_boxes_are_named(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    del inputs["method.boxes.1"]
    with pytest.raises(UsageError, match="the method reads boxes, and source 1 of images has none"):
        assemble(PretrainConfig.model_validate(CONFIG), inputs)


def test_the_proof_recipe_needs_boxes_and_no_superpixels(dev_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    stages = load_pipeline("configs/proof/d3ssl.yaml").stages
    assert {stages[edge.stage].kind for edge in stages["d3ssl"].edges} == {"images", "boxes"}
    assert stages["d3ssl"].edges == stages["decoupled"].edges
    weights = [stages[name].stage.config.method.weights for name in ("d3ssl", "decoupled")]
    assert weights == [{}, {"deposition": 0}]
