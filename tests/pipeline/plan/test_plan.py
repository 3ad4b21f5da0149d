"""What would run and why: reasons, selections and sources; and that making a plan takes little time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config.load import Pipeline
from pipeline.errors import ConfigError, UsageError
from pipeline.plan import history, sources
from pipeline.plan.plan import Plan, make_plan
from pipeline.store.store import ArtifactStore
from tests.pipeline.fake_stages import Superpixels
from tests.pipeline.pipelines import PIPELINE

Load = Callable[..., Pipeline]
ALL = ["scenes", "slic", "warmup", "embeddings", "near", "cotap"]

pytestmark = pytest.mark.usefixtures("scenes")


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "store"))


def execute(pipeline: Pipeline, store: ArtifactStore, plan: Plan | None = None) -> Plan:
    """What a run leaves behind: an artifact and a history entry for every stage of the plan."""
    plan = plan or make_plan(pipeline, store)
    for stage in plan.stages:
        if stage.state == "run":
            writer = store.begin(stage.kind, stage.fingerprint)
            writer.put_file("data.json", stage.fingerprint.encode())
            writer.commit({"stage": stage.name})
        history.remember(store, pipeline.name, stage.name, stage.known_as)
    return plan


def states(plan: Plan) -> dict[str, str | list[str]]:
    return {stage.name: stage.reasons if stage.state == "run" else "cached" for stage in plan.stages}


def test_everything_is_new_then_cached(load: Load, store: ArtifactStore) -> None:
    pipeline = load()
    plan = execute(pipeline, store)
    assert states(plan) == {name: ["new"] for name in ALL}
    again = make_plan(pipeline, store)
    assert states(again) == dict.fromkeys(ALL, "cached")
    assert [stage.artifact is not None and stage.artifact.fingerprint for stage in again.stages] == [
        stage.fingerprint for stage in plan.stages
    ]
    assert again.to_run == []


def test_the_json_is_what_the_design_says(load: Load, store: ArtifactStore) -> None:
    plan = json.loads(json.dumps(make_plan(load(), store).to_json()))
    assert plan["pipeline"] == "p"
    last = plan["stages"][-1]
    assert list(last) == ["name", "uses", "kind", "fingerprint", "state", "reasons", "inputs"]
    assert last["inputs"] == {"images.0.from": "scenes", "init": "warmup", "method.neighbors": "near"}
    assert (last["kind"], last["state"], last["reasons"]) == ("encoder", "run", ["new"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.slic.region_size=16", {"slic": ["stages.slic.region_size 20 -> 16"]}),
        ("stages.slic.ratio=1", {"slic": ["stages.slic.ratio 0.5 -> 1.0"]}),
        (
            "stages.embeddings.encoder=null",
            {
                "embeddings": ["stages.embeddings.encoder warmup -> null"],
                "near": ["input embeddings changed"],
                "cotap": ["input near changed"],
            },
        ),
        (
            "stages.warmup.method={name: plain, temperature: 0.2}",
            {
                "warmup": ["stages.warmup.method.temperature 0.1 -> 0.2"],
                "embeddings": ["input warmup changed"],
                "near": ["input embeddings changed"],
                "cotap": ["input warmup changed", "input near changed"],
            },
        ),
        ("stages.cotap.clip=null", {"cotap": ["stages.cotap.clip 3.0 -> null"]}),
        (
            "stages.cotap.method.weights={patch: 2, image: 0}",
            {
                "cotap": [
                    "stages.cotap.method.weights.patch 1.0 -> 2.0",
                    "stages.cotap.method.weights.image unset -> 0.0",
                ]
            },
        ),
        ("stages.scenes.layout=folder", {}),
        ("stages.cotap.resources={cpus: 2, workers: 4}", {}),
        ("stages.cotap.log_every=99", {}),
    ],
)
def test_a_change_reruns_what_depends_on_it_and_says_why(
    load: Load, store: ArtifactStore, override: str, expected: dict[str, list[str]]
) -> None:
    execute(load(), store)
    assert states(make_plan(load(PIPELINE, override), store)) == {name: expected.get(name, "cached") for name in ALL}


def test_a_list_of_another_length(load: Load, store: ArtifactStore) -> None:
    execute(load(), store)
    changed = load(PIPELINE, "stages.cotap.images=scenes")
    (reasons,) = [stage.reasons for stage in make_plan(changed, store).stages if stage.name == "cotap"]
    assert reasons == ["stages.cotap.images [{weight: 2.0, from: scenes}] -> scenes"]


def test_a_change_that_is_taken_back_is_cached_again(load: Load, store: ArtifactStore) -> None:
    execute(load(), store)
    execute(load(PIPELINE, "stages.slic.region_size=16"), store)
    assert states(make_plan(load(), store))["slic"] == "cached"
    execute(load(), store)
    third = make_plan(load(PIPELINE, "stages.slic.region_size=9"), store)
    assert states(third)["slic"] == ["stages.slic.region_size 20 -> 9"]


def test_another_type_version_or_package(load: Load, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    execute(load(), store)
    with monkeypatch.context() as patch:
        patch.setattr(Superpixels, "version", 2)
        assert states(make_plan(load(), store))["slic"] == ["version 1 -> 2"]
    with monkeypatch.context() as patch:
        from importlib.metadata import version

        patch.setattr("pipeline.plan.fingerprint.version", lambda name: "99.0")
        assert states(make_plan(load(), store))["slic"] == [f"pydantic {version('pydantic')} -> 99.0"]
    other = load(PIPELINE.replace("uses: superpixels", "uses: embeddings").replace("    region_size: 20\n", ""))
    assert states(make_plan(other, store))["slic"] == ["stages.slic.uses superpixels -> embeddings"]


# -- the store -------------------------------------------------------------------------------------------------------


def test_a_flipped_byte_reruns_its_stage_only(load: Load, store: ArtifactStore) -> None:
    plan = execute(load(), store)
    (damaged,) = [stage for stage in plan.stages if stage.name == "warmup"]
    folder = Path(store.address) / damaged.kind / damaged.fingerprint
    (file,) = folder.glob("data*.json")
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    expected = {**dict.fromkeys(ALL, "cached"), "warmup": [f"artifact damaged: {file.name}"]}
    assert states(make_plan(load(), store)) == expected
    (folder / "manifest.json").write_text("{}")
    assert states(make_plan(load(), store)) == {**expected, "warmup": ["artifact damaged: manifest.json"]}


def test_a_deleted_artifact(load: Load, store: ArtifactStore) -> None:
    plan = execute(load(), store)
    shutil.rmtree(Path(store.address) / plan.stages[1].kind)
    assert states(make_plan(load(), store)) == {
        **dict.fromkeys(ALL, "cached"),
        "slic": ["artifact gone from the store"],
    }


def test_another_pipeline_finds_the_same_artifacts(load: Load, store: ArtifactStore) -> None:
    execute(load(), store)
    assert states(make_plan(load(PIPELINE + "name: other\n"), store)) == dict.fromkeys(ALL, "cached")


def test_history_is_by_pipeline_and_stage_and_survives_nonsense(load: Load, store: ArtifactStore) -> None:
    plan = execute(load(), store)
    entry = plan.stages[0].known_as
    assert history.recall(store, "p", "scenes") == entry
    assert history.recall(store, "p-scenes", "") is None
    for name, stage in [("a b/../c", "x"), ("a-b-c", "x")]:
        history.remember(store, name, stage, {**entry, "fingerprint": name})
    recalled = history.recall(store, "a b/../c", "x")
    assert recalled is not None
    assert recalled["fingerprint"] == "a b/../c"
    store.write_record(history._record("p", "scenes"), {"old": "format"})
    assert history.recall(store, "p", "scenes") is None
    store.write_record(history._record("p", "scenes"), {**entry, "identity": {}})
    assert history.recall(store, "p", "scenes") is None


def test_a_new_way_to_make_fingerprints_is_said(
    load: Load, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(load(), store)
    monkeypatch.setattr("pipeline.plan.fingerprint.FORMAT", 2)
    assert states(make_plan(load(), store)) == {name: [history.NEW_FORMAT] for name in ALL}


# -- sources ---------------------------------------------------------------------------------------------------------


def test_a_second_plan_opens_no_source_and_no_artifact(
    load: Load, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(load(), store)
    for root, _, names in os.walk(store.address):  # as if the artifacts had been written a while ago
        for name in names:
            os.utime(Path(root) / name, (1, 1))
    from pipeline.store import integrity

    monkeypatch.setattr(integrity, "GRAIN_NS", 0)
    make_plan(load(), store)
    monkeypatch.setattr(sources._Local, "digest", lambda self, path: pytest.fail(f"{path} was opened"))
    monkeypatch.setattr(integrity, "content_reason", lambda *arguments: pytest.fail("an artifact was read"))
    assert states(make_plan(load(), store)) == dict.fromkeys(ALL, "cached")


def test_touched_files_rerun_nothing_and_changed_ones_all(load: Load, store: ArtifactStore, scenes: Path) -> None:
    execute(load(), store)
    os.utime(scenes / "a.jpg", (1, 1))
    assert states(make_plan(load(), store)) == dict.fromkeys(ALL, "cached")
    (scenes / "a.jpg").write_bytes(b"other")
    found = states(make_plan(load(), store))
    assert found["scenes"] == ["source scenes changed"]
    assert found["slic"] == ["input scenes changed"]


def test_a_moved_source_reruns_nothing(load: Load, store: ArtifactStore, scenes: Path) -> None:
    execute(load(), store)
    scenes.rename(scenes.parent / "elsewhere")
    moved = load(PIPELINE, "stages.scenes.source=elsewhere")
    assert states(make_plan(moved, store)) == dict.fromkeys(ALL, "cached")
    (scenes.parent / "elsewhere" / "a.jpg").unlink()
    assert states(make_plan(moved, store))["scenes"] == ["stages.scenes.source scenes -> elsewhere"]


def test_every_missing_or_empty_source_is_named_with_its_place(load: Load, store: ArtifactStore, scenes: Path) -> None:
    (scenes.parent / "empty").mkdir()
    text = PIPELINE.replace("source: scenes", "source: nowhere") + "  more: {uses: ingest, source: empty}\n"
    with pytest.raises(ConfigError) as caught:
        make_plan(load(text), store)
    first, second = str(caught.value).splitlines()
    assert first.startswith("p.yaml:5: stages.scenes.source: nothing is at nowhere (looked in ")
    assert second.startswith("p.yaml:29: stages.more.source: there is no file in empty")
    assert caught.value.exit_code == 2


def test_what_a_plan_keeps_of_a_source(load: Load, store: ArtifactStore) -> None:
    source = make_plan(load(), store).stages[0].sources["source"]
    assert (source["address"], source["files"], source["bytes"]) == ("scenes", 2, 11)


# -- selections ------------------------------------------------------------------------------------------------------


def test_force_reruns_the_stage_and_leaves_what_is_below_cached(load: Load, store: ArtifactStore) -> None:
    execute(load(), store)
    assert states(make_plan(load(), store, force=["warmup"])) == {**dict.fromkeys(ALL, "cached"), "warmup": ["forced"]}
    changed = load(PIPELINE, "stages.slic.region_size=9")
    assert states(make_plan(changed, store, force=["slic"]))["slic"] == ["stages.slic.region_size 20 -> 9"]


def test_only_runs_just_these_with_what_they_read(load: Load, store: ArtifactStore) -> None:
    execute(load(), store)
    changed = load(PIPELINE, "stages.slic.region_size=9", "stages.near.k=9")
    assert states(make_plan(changed, store, only=["slic"])) == {
        "scenes": "cached",
        "slic": ["stages.slic.region_size 20 -> 9"],
    }
    assert states(make_plan(load(), store, only=["slic"])) == {"slic": "cached"}
    assert states(make_plan(changed, store, only=["near", "cotap"])) == {
        "scenes": "cached",
        "warmup": "cached",
        "embeddings": "cached",
        "near": ["stages.near.k 20 -> 9"],
        "cotap": ["input near changed"],
    }


def test_only_says_which_input_is_not_cached(load: Load, store: ArtifactStore) -> None:
    with pytest.raises(UsageError, match=r"--only slic: its input images comes from 'scenes', .* \(new\); add --only"):
        make_plan(load(), store, only=["slic"])
    plan = make_plan(load(), store, only=["scenes", "slic"])
    assert states(plan) == {"scenes": ["new"], "slic": ["new"]}


def test_only_asks_nothing_of_stages_beyond_its_inputs(load: Load, store: ArtifactStore) -> None:
    plan = execute(load(), store)
    shutil.rmtree(Path(store.address) / "images")
    changed = load(PIPELINE, "stages.near.k=9")
    assert states(make_plan(changed, store, only=["near"])) == {
        "embeddings": "cached",
        "near": ["stages.near.k 20 -> 9"],
    }
    assert len(plan.stages) == 6


def test_from_takes_what_is_below_and_runs_what_the_cache_lacks_above(load: Load, store: ArtifactStore) -> None:
    plan = make_plan(load(), store, from_=["near"])
    assert states(plan) == {name: ["new"] for name in ("scenes", "warmup", "embeddings", "near", "cotap")}
    execute(load(), store, plan)
    changed = load(PIPELINE, "stages.near.k=9")
    assert states(make_plan(changed, store, from_=["near"])) == {
        "scenes": "cached",
        "warmup": "cached",
        "embeddings": "cached",
        "near": ["stages.near.k 20 -> 9"],
        "cotap": ["input near changed"],
    }
    assert states(make_plan(load(), store, from_=["near"])) == {"near": "cached", "cotap": "cached"}


def test_only_and_from_select_together(load: Load, store: ArtifactStore) -> None:
    execute(load(), store)
    assert set(states(make_plan(load(), store, only=["slic"], from_=["near"]))) == {"slic", "near", "cotap"}


@pytest.mark.parametrize("option", ["only", "from_", "force"])
def test_names_that_do_not_exist(load: Load, store: ArtifactStore, option: str) -> None:
    with pytest.raises(UsageError, match=r"p.yaml has no stage 'warmpu' \(did you mean 'warmup'\?\)"):
        make_plan(load(), store, **{option: ["warmpu"]})


def test_force_must_be_part_of_the_selection(load: Load, store: ArtifactStore) -> None:
    with pytest.raises(UsageError, match="--force cotap: the stage is not part of what is to run"):
        make_plan(load(), store, only=["slic"], force=["cotap"])


# -- cost ------------------------------------------------------------------------------------------------------------


def test_planning_is_quick_and_imports_nothing_heavy(write: Callable[..., Path], tmp_path: Path) -> None:
    """A whole process: load the pipeline, plan it, and look up every cached artifact."""
    write()
    code = """
import sys, time
from pipeline.config.load import load_pipeline
from pipeline.plan.plan import make_plan
from pipeline.store.store import ArtifactStore
from tests.pipeline.fake_stages import STAGES
pipeline = load_pipeline("p.yaml", stage_types=STAGES)
make_plan(pipeline, ArtifactStore("store"))
heavy = {"torch", "ray", "mlflow", "cv2", "timm", "pyarrow", "pandas", "omegaconf", "matplotlib", "numpy"}
print(sorted(heavy & sys.modules.keys()), time.process_time() < 3)
"""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[] True", done.stderr
