"""Every recipe in configs/ is a valid pipeline, and its plan asks for the tables that its method reads, no others."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.load import load_pipeline
from pipeline.plan.plan import make_plan
from pipeline.store.store import ArtifactStore
from stages.pretrain.config.pretrain import PretrainConfig
from stages.training.settings import TrainingConfig

ROOT = Path(__file__).parents[1]
SPACES = {path for path in (ROOT / "configs").rglob("*.yaml") if "\nspace:" in path.read_text()}  # of sweeps
RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in {*(ROOT / "configs").rglob("*.yaml")} - SPACES)
TABLES = {"boxes", "superpixels", "neighbors", "embeddings"}
NEEDS = {
    "configs/proof/cotap.yaml": {"neighbors", "embeddings"},
    "configs/proof/d3ssl.yaml": {"boxes"},
    "configs/proof/dsa.yaml": {"embeddings"},
    "configs/proof/flsl.yaml": set(),
    "configs/proof/vice.yaml": {"superpixels"},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_a_valid_pipeline_with_a_header(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    pipeline = load_pipeline(recipe)
    configs = [stage.stage.config for stage in pipeline.stages.values()]
    trainings = [config for config in configs if isinstance(config, TrainingConfig)]
    assert trainings or recipe.startswith("configs/evaluation/")  # of an encoder from a file
    for config in trainings:  # Ray's workers and replays get their settings like this
        assert type(config).model_validate(config.model_dump(mode="json", by_alias=True)) == config
    header = (ROOT / recipe).read_text().split("\n\n")[0]
    assert header.startswith("# ")


@pytest.mark.parametrize("recipe", sorted(NEEDS))
def test_a_plan_has_the_tables_that_its_method_reads(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two small folders in place of the development images."""
    monkeypatch.chdir(ROOT)
    overrides = []
    for name, file in (("scenes", "images/a.jpg"), ("scenes", "masks/a.png"), ("objects", "train/a/b.jpg")):
        (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name / file).write_bytes(name.encode())
        overrides.append(f"stages.{name}.source={tmp_path / name}")
    pipeline = load_pipeline(recipe, overrides, str(tmp_path / "store"))
    plan = make_plan(pipeline, ArtifactStore(str(tmp_path / "store")))
    assert {stage.kind for stage in plan.stages} & TABLES == NEEDS[recipe]
    assert all(stage.reasons == ["new"] for stage in plan.stages)


@pytest.mark.parametrize("recipe", sorted(NEEDS))
def test_a_proof_compares_two_trainings_alike_in_all_but_the_method(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    configs = [stage.stage.config for stage in load_pipeline(recipe).stages.values() if stage.uses == "pretrain"]
    first, second = configs[-2:]
    assert isinstance(first, PretrainConfig)
    assert first.method != second.method
    assert first.model_dump(exclude={"method"}) == second.model_dump(exclude={"method"})
