"""A sweep of the real stages: rungs of a real training, judged by k-NN, on the photographs of the quickstart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.cli.main import main

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

ROOT = Path(__file__).parents[3]
PIPELINE = """
store: {store}
tracking: null
stages:
  images: {{uses: ingest, source: {source}, layout: folder}}
  train:
    uses: pretrain
    images: images
    backbone:
      {{name: vit_tiny_patch16_224, img_size: 32, patch_size: 8, kwargs: {{depth: 2, embed_dim: 32, num_heads: 2}}}}
    method:
      name: dino_dense
      global_crops: {{size: 32, count: 2, scale: [0.4, 1.0]}}
      local_crops: {{size: 16, count: 2, scale: [0.05, 0.4]}}
      head: {{prototypes: 32, hidden: 32, bottleneck: 16}}
    epochs: 6
    batch_size: 4
    loader_workers: 0
    resources: {{workers: {workers}, cpus: 1}}
  knn: {{uses: classify_knn, images: images, encoder: train, k: 2, resize: 32, crop: 32, random_baseline: false}}
"""
SPACE = {
    "objective": "knn.top1",
    "space": {"stages.train.method.weights.align_patch": {"grid": [0.5, 2]}},
    "search": "grid",
    "rungs": [4],
    "seeds": [0, 1],
}


@pytest.mark.parametrize("workers", [0, 1])
def test_trials_of_real_stages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make_image: object, workers: int
) -> None:
    for split in ("train", "val"):
        for label in ("a", "b"):
            for i in range(4):
                make_image(tmp_path / "photos" / split / label / f"{i}.jpg", 48, 40, i)  # type: ignore[operator]
    config, space = tmp_path / "p.yaml", tmp_path / "s.yaml"
    config.write_text(PIPELINE.format(store=tmp_path / "store", source=tmp_path / "photos", workers=workers))
    space.write_text(json.dumps(SPACE))
    command = ["sweep", str(config), "--space", str(space), "--to", str(tmp_path / "out"), "--json"]
    assert main([*command, "--set", "stages.train.epochs=2"]) == 2
    assert "4 is not before the end of this training of 4 steps" in capsys.readouterr().err
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert [trial["state"] for trial in found["trials"]] == ["finished"] * 2
    assert main(["plan", str(tmp_path / "out" / "best.yaml"), "--json"]) == 0
    assert {stage["state"] for stage in json.loads(capsys.readouterr().out)["stages"]} == {"cached"}
