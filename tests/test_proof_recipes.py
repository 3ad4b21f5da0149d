"""Every method trains from its proof recipe through `tessera run`, in one process and in two, with the same terms.

The quickstart's photographs stand in for the development images, and a run is three steps; all else is the recipe's.
Part of `make test-slow`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.load import load_pipeline

ROOT = Path(__file__).parents[1]
PHOTOS = ROOT / "configs" / "quickstart"
METHODS = ["cotap", "d3ssl", "dsa", "flsl", "vice"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four photographs in class folders, and room for a store: the recipes share what they have in common."""
    root = tmp_path_factory.mktemp("proofs")
    for i, photo in enumerate(sorted((PHOTOS / "images").rglob("*.jpg"))[:24]):
        folder = root / "objects" / "train" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, folder)
    return root


def overrides(recipe: str, objects: Path) -> dict[str, str]:
    settings = {
        "tracking": "null",
        "stages.scenes.source": str(PHOTOS),
        "stages.scenes.layout": "coco",
        "stages.objects.source": str(objects),
    }
    for name, stage in load_pipeline(recipe).stages.items():
        if stage.uses == "pretrain":
            short = {"steps": "3", "epochs": "null", "batch_size": "8", "precision": "fp32", "log_every": "1"}
            settings |= {f"stages.{name}.{key}": value for key, value in short.items()}
            settings[f"stages.{name}.watch.gradients_every"] = "1"
    return settings


def run(recipe: str, method: str, settings: dict[str, str], store: Path, workers: int) -> list[dict[str, float]]:
    """The curves of the stage that is called like the method, after a run of it and of what it needs."""
    pipeline = load_pipeline(recipe)
    needed = {method}
    for name in reversed(pipeline.stages):
        if name in needed:
            needed |= set(pipeline.stages[name].inputs.values())
    resources = {f"stages.{method}.resources.workers": str(workers)}
    if workers > 1:
        resources[f"stages.{method}.resources.cpus"] = "0.5"
    command = [sys.executable, "-m", "pipeline.cli", "run", recipe, "--store", str(store), "--json", "--force", method]
    for name in needed:
        command += ["--only", name]
    for key, value in (settings | resources).items():
        command += ["--set", f"{key}={value}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    stages = {stage["name"]: stage for stage in json.loads(done.stdout)["stages"]}
    file = next(Path(stages[method]["artifact"]).glob("curves.*json"))
    rows: list[dict[str, float]] = json.loads(file.read_text())
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_one_process_and_two_give_the_same_terms(method: str, place: Path) -> None:
    recipe = f"configs/proof/{method}.yaml"
    settings = overrides(recipe, place / "objects")
    one = run(recipe, method, settings, place / "store", workers=0)
    two = run(recipe, method, settings, place / "store", workers=2)
    # What else a row says (entropies, ranks of features) is of each process's own share of the images.
    terms = [key.removeprefix("weight/") for key in one[0] if key.startswith("weight/")] + ["total"]
    assert len(one) == len(two) == 3
    assert len(terms) >= 2
    for row, other in zip(one, two, strict=True):
        assert {key: row[key] for key in terms} == pytest.approx({key: other[key] for key in terms}, rel=2e-3, abs=1e-5)
