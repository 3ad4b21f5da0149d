"""The pre-train stage in a plan: what it needs to be planned, and which tables go with which images."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.load import load_pipeline
from pipeline.errors import ConfigError
from pipeline.plan.plan import Plan, make_plan
from pipeline.store.store import ArtifactStore
from stages.pretrain.stage import Pretrain, PretrainConfig
from tests.stages.pretrain.config.test_pretrain import COTAP


def test_training_in_the_drivers_process_needs_no_ray() -> None:
    def stage(workers: int | None) -> Pretrain:
        return Pretrain(PretrainConfig.model_validate({**COTAP, "resources": {"workers": workers}}))

    assert not stage(0).uses_ray
    assert stage(2).uses_ray
    assert stage(None).uses_ray


def test_reading_the_config_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from stages.pretrain.stage import PretrainConfig; "
        f"PretrainConfig.model_validate({COTAP!r}); "
        "print([m for m in ('torch', 'ray', 'cv2', 'pyarrow', 'timm', 'mlflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


PIPELINE = """
store: {store}
tracking: null
stages:
  objects: {{uses: ingest, source: {objects}, layout: folder}}
  scenes: {{uses: ingest, source: {scenes}, layout: folder}}
  embeddings: {{uses: embeddings, images: {embedded}, backbone: {{name: resnet18}}}}
  neighbors: {{uses: neighbors, embeddings: embeddings, k: 2}}
  boxes: {{uses: selective_search, images: scenes}}
  cotap:
    uses: pretrain
    images: {images}
    backbone: {{name: resnet18}}
    method: {method}
    epochs: 1
"""


def plan(tmp_path: Path, **changes: str) -> Plan:
    for name in ("objects", "scenes"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "a.jpg").write_bytes(name.encode())
    fields = {
        "store": str(tmp_path / "store"),
        "objects": str(tmp_path / "objects"),
        "scenes": str(tmp_path / "scenes"),
        "embedded": "objects",
        "images": "[{from: objects}]",
        "method": "{name: cotap, neighbors: neighbors}",
    }
    file = tmp_path / "pipeline.yaml"
    file.write_text(PIPELINE.format(**{**fields, **changes}))
    pipeline = load_pipeline(str(file))
    return make_plan(pipeline, ArtifactStore(pipeline.store))


def test_a_table_of_another_image_set_is_refused_when_planning(tmp_path: Path) -> None:
    message = (
        r"pipeline\.yaml:\d+: stages\.cotap\.method\.neighbors: neighbors is made from the images of scenes, and this "
        r"stage trains on those of objects.*name a neighbors stage that is made from the same images"
    )
    with pytest.raises(ConfigError, match=message):
        plan(tmp_path, embedded="scenes")
    with pytest.raises(ConfigError, match=r"stages\.cotap\.method\.boxes: boxes is made from the images of scenes"):
        plan(tmp_path, method="{name: d3ssl, boxes: boxes}")


def test_neighbours_of_scenes_are_refused_when_planning(tmp_path: Path) -> None:
    message = r"stages\.cotap\.method\.neighbors: neighbors is made from the images of scenes, which are scenes here"
    both = "[{from: objects}, {from: scenes, role: scenes}]"
    with pytest.raises(ConfigError, match=message):
        plan(tmp_path, embedded="scenes", images=both)
    assert {stage.name for stage in plan(tmp_path, images=both).stages} >= {"cotap"}


def test_the_same_images_under_another_name_are_the_same_set(tmp_path: Path) -> None:
    states = {stage.name: stage.state for stage in plan(tmp_path).stages}
    assert states["cotap"] == "run"
    same = str(tmp_path / "objects")  # by fingerprint, not by name
    assert {stage.name for stage in plan(tmp_path, embedded="scenes", scenes=same).stages} >= {"cotap", "scenes"}
