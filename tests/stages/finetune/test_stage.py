"""Fine-tuning in a plan: a cell of a comparison for the encoder it starts from, a start for what comes after it."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest

from pipeline.compare.grouping import group
from pipeline.config.load import load_pipeline
from pipeline.errors import ConfigError
from pipeline.plan.plan import make_plan
from pipeline.store.store import ArtifactStore
from stages.finetune.classification import FinetuneClassification
from tests.stages.finetune.conftest import ALONE, Tune

PIPELINE = """
store: {store}
tracking: null
stages:
  photos: {{uses: ingest, source: {photos}, layout: folder}}
  random: {{uses: encoder, backbone: {{name: {name}}}}}
  other: {{uses: encoder, backbone: {{name: resnet10t}}}}
  tuned_random: &tuned
    uses: finetune_classification
    images: photos
    encoder: random
    steps: 3
    batch_size: 2
  tuned_other: {{uses: finetune_classification, images: photos, encoder: other, steps: 3, batch_size: 2}}
  knn: {{uses: classify_knn, images: photos, encoder: tuned_random}}
  again: {{uses: finetune_segmentation, images: photos, encoder: tuned_random, steps: 3, batch_size: 2, size: 100}}
"""


def written(folder: Path, name: str) -> Path:
    for split in ("train", "val"):
        (folder / "photos" / split / "a").mkdir(parents=True, exist_ok=True)
        (folder / "photos" / split / "a" / "b.jpg").write_bytes(split.encode())
    file = folder / "pipeline.yaml"
    file.write_text(PIPELINE.format(store=folder / "store", photos=folder / "photos", name=name))
    return file


def test_a_fine_tuning_is_a_cell_of_its_start_and_a_row_for_others(tmp_path: Path) -> None:
    pipeline = load_pipeline(str(written(tmp_path, "resnet18")))
    plan = make_plan(pipeline, ArtifactStore(pipeline.store))
    assert {stage.name: stage.kind for stage in plan.stages}["tuned_random"] == "encoder"
    rows, columns = group(pipeline, plan)
    assert [row.name for row in rows] == ["random", "other", "tuned_random"]
    assert {column.name: column.cells for column in columns} == {
        "tuned": {"random": ["tuned_random"], "other": ["tuned_other"]},
        "knn": {"tuned_random": ["knn"]},
        "again": {"tuned_random": ["again"]},
    }


def test_a_plan_knows_the_backbone_through_a_fine_tuning(tmp_path: Path) -> None:
    pipeline = load_pipeline(str(written(tmp_path, "vit_tiny_patch16_224")))
    with pytest.raises(ConfigError, match=r"stages\.again\.size: 100 pixels do not split into patches of 16"):
        make_plan(pipeline, ArtifactStore(pipeline.store))


def test_only_the_encoder_is_exported(tune: Tune, tmp_path: Path) -> None:
    settings = {"size": 32, "steps": 1, **ALONE}
    _, artifact = tune(FinetuneClassification, "c" * 24, settings)
    files = [entry.name for entry in artifact.manifest.files]
    exported = [name for name in files for pattern in FinetuneClassification.exports if fnmatch(name, pattern)]
    assert sorted(exported) == ["encoder.json", "encoder.safetensors"]
    for name in exported:
        shutil.copy(artifact.local(name), tmp_path / name)
    FinetuneClassification.complete_export(artifact, tmp_path)
    assert "fine-tuned classification" in (tmp_path / "README.md").read_text()
