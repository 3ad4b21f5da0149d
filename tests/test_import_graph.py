"""The project's import graph keeps its rules, and the checker of these rules finds what breaks them.

The rules, for every import in pipeline/ and stages/, inside functions and for typing too:

- Imports go in no circle.
- pipeline imports nothing of stages.
- A room of stages (stages/NAME) imports no other room than data, map_images, models and training; these four import
  only each other and pipeline.
- stages import of pipeline the contract (pipeline.stage, pipeline.errors, pipeline.config.registry) and the store's
  two faces (pipeline.store.artifact, pipeline.store.writer, and FileEntry, which the first of them returns).
- A file in a `losses` folder imports torch, the standard library and other losses.
- A method's folder in stages/pretrain/methods is imported by itself and by a method that extends it, which its name
  says: dino_dense is dino with one more loss, so it may import dino. What several methods need lies in methods/shared.
- Ray is imported in pre-training, fine-tuning and training by a launch folder only, and not by data and models: a
  training loop runs without.
- A file has at most 400 lines, and no file or folder is called utils, helpers, common or misc.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.import_rules import read_imports, violations

ROOT = Path(__file__).parents[1]
METHODS = "stages/pretrain/methods"

# A small project that keeps every rule, and uses every kind of import that is allowed.
SOUND = {
    "pipeline/__init__.py": "",
    "pipeline/errors.py": "class UsageError(Exception): ...",
    "pipeline/stage.py": "from .errors import UsageError",
    "pipeline/store/manifest.py": "class FileEntry: ...\nclass Manifest: ...",
    "pipeline/store/artifact.py": "from pipeline.store.manifest import FileEntry, Manifest",
    "stages/__init__.py": "",
    "stages/data/tables.py": "from pipeline.store.manifest import FileEntry\nfrom stages.models import heads",
    "stages/models/heads.py": "import torch",
    "stages/regions/stage.py": "import ray\nfrom pipeline import errors, stage\nimport stages.data.tables",
    "stages/pretrain/launch/ray_train.py": "import ray.train",
    "stages/pretrain/losses/sinkhorn.py": "from __future__ import annotations\nimport math\nimport torch.nn",
    f"{METHODS}/method.py": "",
    f"{METHODS}/shared/queue.py": "from stages.pretrain.methods import method",
    f"{METHODS}/dino/method.py": "from ..shared.queue import Queue\nfrom stages.pretrain.methods.method import Method",
    f"{METHODS}/dino_dense/method.py": "from stages.pretrain.methods.dino.method import DINO",
    f"{METHODS}/dino/losses/own.py": "from stages.pretrain.losses.sinkhorn import sinkhorn",
}


def project(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_the_project_keeps_the_rules() -> None:
    assert len(list(read_imports(ROOT))) > 500, "the checker reads the project"
    broken = violations(ROOT)
    assert not broken, f"{len(broken)} rules broken:\n" + "\n".join(broken)


def test_a_sound_project_breaks_no_rule(tmp_path: Path) -> None:
    assert violations(project(tmp_path, SOUND)) == []


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "pipeline/errors.py",
            "def f():\n    from stages.data import tables",
            "errors.py:2 imports stages.data.tables",
        ),
        ("pipeline/errors.py", "import_module('stages.data.tables')", "pipeline imports nothing of stages"),
        ("stages/regions/a.py", "import stages.pretrain.launch.ray_train", "a room of stages imports no other room"),
        ("stages/regions/a.py", "from ..pretrain.launch import ray_train", "imports stages.pretrain.launch.ray_train"),
        ("stages/data/a.py", "from stages.regions.stage import *", "imports stages.regions.stage: a room of stages"),
        (
            "stages/data/a.py",
            "from pipeline.store.manifest import Manifest",
            "pipeline.store.manifest.Manifest: stages",
        ),
        ("stages/data/a.py", "import pipeline.store.manifest", "stages import of pipeline only"),
        ("stages/data/a.py", "from pipeline import store", "a.py:1 imports pipeline.store: stages import of pipeline"),
        ("stages/pretrain/losses/a.py", "import numpy as np", "a.py:1 imports numpy: a loss imports only torch"),
        ("stages/pretrain/losses/a.py", "import stages.models.heads", "a loss imports only torch"),
        (f"{METHODS}/dino/losses/a.py", "from .. import method", "a loss imports only torch"),
        (
            f"{METHODS}/vice/a.py",
            "from stages.pretrain.methods.dino.method import DINO",
            "only a method that extends it",
        ),
        (f"{METHODS}/dino/a.py", "from ..dino_dense import method", "only a method that extends it (dino_dense_...)"),
        (f"{METHODS}/shared/a.py", "from stages.pretrain.methods.dino import method", "only a method that extends it"),
        ("stages/pretrain/launch/a.py", "import stages.pretrain.methods.dino.method", "only a method that extends it"),
        (
            "stages/pretrain/a.py",
            "def f():\n    import ray.train",
            "a.py:2 imports ray.train: training and what it uses",
        ),
        ("stages/training/a.py", "from ray import train", "a.py:1 imports ray.train: training and what it uses"),
        ("stages/data/a.py", "#\n" * 401, "stages/data/a.py has 401 lines"),
        ("tests/test_a.py", "#\n" * 401, "tests/test_a.py has 401 lines"),
        ("stages/data/image_utils.py", "", "stages/data/image_utils.py is called utils"),
        ("pipeline/common/a.py", "", "pipeline/common/a.py is called common"),
    ],
)
def test_each_kind_of_break_is_reported_alone(tmp_path: Path, file: str, text: str, message: str) -> None:
    (found,) = violations(project(tmp_path, SOUND | {file: text}))
    assert message in found
    assert file in found


@pytest.mark.parametrize(
    "circle",
    [
        ["import stages.data.b", "import stages.data.a"],
        ["from stages.data import b", "def f():\n    from stages.data import a"],
        ["from . import b", "if TYPE_CHECKING:\n    from .a import A"],
        ["from .b import B", "from .c import C", "from .a import A"],
    ],
)
def test_a_circle_is_reported_once_with_its_imports(tmp_path: Path, circle: list[str]) -> None:
    files = {f"stages/data/{name}.py": text for name, text in zip("abc", circle, strict=False)}
    (found,) = violations(project(tmp_path, SOUND | files))
    assert found.endswith("imports go in no circle")
    assert all(f"{file}:" in found for file in files)
    assert found.count(", ") == len(circle) - 1
