"""Pipeline files that break a rule, each with its message; all problems at once; the order of stages."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config.load import Pipeline, load_pipeline
from pipeline.errors import ConfigError
from pipeline.stage import Stage
from tests.pipeline.fake_stages import STAGES, Pretrain, WithNeighbors
from tests.pipeline.pipelines import PIPELINE

Load = Callable[..., Pipeline]


def problems(load: Load, text: str = PIPELINE, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    return str(caught.value).splitlines()


def test_a_pipeline_in_order_with_kinds_edges_and_sources(load: Load) -> None:
    pipeline = load()
    assert list(pipeline.stages) == ["scenes", "slic", "warmup", "embeddings", "near", "cotap"]
    cotap = pipeline.stages["cotap"]
    assert (cotap.uses, cotap.kind) == ("pretrain", "encoder")
    assert cotap.inputs == {"images.0.from": "scenes", "init": "warmup", "method.neighbors": "near"}
    assert isinstance(cotap.stage, Pretrain)
    assert isinstance(cotap.stage.config.method, WithNeighbors)
    assert pipeline.stages["scenes"].sources == {"source": "scenes"}
    assert (pipeline.name, pipeline.store, pipeline.file) == ("p", "somewhere", Path("p.yaml"))


def test_defaults_and_what_beats_them(load: Load, write: Callable[..., Path]) -> None:
    bare = "stages: {s: {uses: ingest, source: x}}"
    pipeline = load(bare)
    assert (pipeline.store, pipeline.tracking) == (".tessera/store", "sqlite:///.tessera/mlflow.db")
    assert load(bare + "\ntracking: ~").tracking is None
    assert load(bare + "\nname: n", "tracking=http://m:5000").tracking == "http://m:5000"
    assert load(bare + "\nname: n").name == "n"
    assert load_pipeline(write(PIPELINE), store="elsewhere").store == "elsewhere"


def test_inputs_come_first_whatever_the_order_in_the_file(load: Load) -> None:
    text = """\
    stages:
      near: {uses: neighbors, embeddings: emb}
      slic: {uses: superpixels, images: scenes}
      emb: {uses: embeddings, images: scenes}
      scenes: {uses: ingest, source: x}
    """
    assert list(load(text).stages) == ["scenes", "emb", "near", "slic"]


def test_plain_is_what_a_file_without_extends_would_say(load: Load, write: Callable[..., Path]) -> None:
    write(PIPELINE, "base.yaml")
    plain = load("extends: base.yaml\nstages: {slic: {region_size: 9}}", "stages.cotap.epochs=3").plain()
    assert "extends" not in plain
    assert plain["stages"]["slic"] == {"uses": "superpixels", "images": "scenes", "region_size": 9}
    assert plain["stages"]["cotap"]["epochs"] == 3


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (
            "neighbors: near",
            "neighbors: embeddings",
            "p.yaml:27: stages.cotap.method.neighbors: 'embeddings' is a stage of kind embeddings, expected neighbors "
            "(name near)",
        ),
        (
            "{from: scenes, weight: 2}",
            "{from: warmup}",
            "p.yaml:23: stages.cotap.images.0.from: 'warmup' is a stage of kind encoder, expected images (name scenes)",
        ),
        (
            "init: warmup",
            "init: warmpu",
            "p.yaml:24: stages.cotap.init: no stage is called 'warmpu' (did you mean 'warmup'?)",
        ),
        (
            "init: warmup",
            "init: cotap",
            "p.yaml:24: stages.cotap.init: 'cotap' is this stage itself (name an earlier stage)",
        ),
        (
            "region_size: 20",
            "region_sise: 20",
            "p.yaml:9: stages.slic.region_sise: unknown key 'region_sise' (did you mean 'region_size'?)",
        ),
        (
            "region_size: 20",
            "region_size: big",
            "p.yaml:9: stages.slic.region_size: must be a whole number, got 'big' (pixels)",
        ),
        ("region_size: 20", "region_size: 20.5", "must be a whole number, got 20.5"),
        (
            "region_size: 20",
            "region_size: 1",
            "p.yaml:9: stages.slic.region_size: must be greater than 1, got 1 (pixels)",
        ),
        (
            "region_size: 20",
            "resources: {cpu: 2}",
            "stages.slic.resources.cpu: unknown key 'cpu' (did you mean 'cpus'?)",
        ),
        (
            "source: scenes",
            "source: scenes\n    layout: mask",
            "p.yaml:6: stages.scenes.layout: must be 'folder', 'masks' or 'coco', got 'mask' (did you mean 'masks'?)",
        ),
        ("    source: scenes\n", "", "p.yaml:3: stages.scenes.source: 'source' is missing (folder of images)"),
        (
            "    embeddings: embeddings\n",
            "",
            "near.embeddings: 'embeddings' is missing (name a stage of kind embeddings)",
        ),
        (
            "uses: superpixels",
            "uses: superpixel",
            "p.yaml:7: stages.slic.uses: no stage type is called 'superpixel' (did you mean 'superpixels'?)",
        ),
        ("    uses: superpixels\n", "", "p.yaml:6: stages.slic: 'uses' is missing (name its type: one of embeddings,"),
        ("  slic:", "  SLIC:", "p.yaml:6: stages.SLIC: 'SLIC' is no stage name (use a-z, 0-9, _ and -)"),
        ("store: somewhere", "stor: x", "p.yaml:1: stor: unknown key 'stor' (did you mean 'store'?)"),
        ("store: somewhere", "store: [x]", "p.yaml:1: store: must be a word, got ['x']"),
        (
            "weights: {patch: 1.0}",
            "weights: {patch: lots}",
            "p.yaml:28: stages.cotap.method.weights.patch: must be a number, got 'lots'",
        ),
        (
            "weights: {patch: 1.0}",
            "wieghts: {patch: 1.0}",
            "p.yaml:28: stages.cotap.method.wieghts: unknown key 'wieghts' (did you mean 'weights'?)",
        ),
        ("name: near\n", "name: nea\n", "stages.cotap.method: a method is a mapping with a name, one of plain, near"),
        (
            "[{from: scenes, weight: 2}]",
            "[{form: scenes}]",
            "stages.cotap.images.0.form: unknown key 'form' (did you mean 'from'?)",
        ),
        ("[{from: scenes, weight: 2}]", "{from: scenes}", "stages.cotap.images: must be a word or must be a list, got"),
    ],
)
def test_every_rule_is_named_with_place_and_remedy(load: Load, old: str, new: str, complaint: str) -> None:
    assert old in PIPELINE
    found = problems(load, PIPELINE.replace(old, new, 1))
    assert any(complaint in line for line in found), found
    assert len(found) == (2 if "form:" in new else 1)  # a misspelt key is also a missing one


def test_all_problems_of_a_file_come_at_once_in_its_order(load: Load) -> None:
    text = PIPELINE.replace("region_size: 20", "region_sise: 20").replace("init: warmup", "init: nowhere")
    text = text.replace("store: somewhere", "stor: x").replace("source: scenes", "source: [1]")
    found = problems(load, text, "stages.near.k=many")
    assert [line.split(": ")[0] for line in found] == [
        "--set stages.near.k=many",
        "p.yaml:1",
        "p.yaml:5",
        "p.yaml:9",
        "p.yaml:24",
    ]


def test_a_ring_is_named_in_order_once(load: Load) -> None:
    found = problems(load, PIPELINE, "stages.warmup.init=cotap", "stages.embeddings.encoder=warmup")
    assert found == [
        "p.yaml:10: stages.warmup: stages wait for each other: warmup -> cotap -> warmup (remove one of these edges)",
        "p.yaml:10: stages.warmup: stages wait for each other: warmup -> embeddings -> near -> cotap -> warmup "
        "(remove one of these edges)",
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "p.yaml: a pipeline is a mapping with the key 'stages'"),
        ("- a\n", "p.yaml: a pipeline is a mapping with the key 'stages'"),
        ("store: x\n", "p.yaml: stages: a pipeline needs at least one stage"),
        ("stages: {}\n", "p.yaml:1: stages: a pipeline needs at least one stage"),
        ("stages:\n  a:\n", "p.yaml:2: stages.a: a stage is a mapping with the key 'uses', got nothing"),
        ("stages: {a: ingest}\n", "p.yaml:1: stages.a: a stage is a mapping with the key 'uses', got 'ingest'"),
        ("stages: {a: {uses: 3}}\n", "p.yaml:1: stages.a: 'uses' must be a word"),
        ("stages: [\n", "not valid YAML"),
    ],
)
def test_what_is_no_pipeline(load: Load, text: str, complaint: str) -> None:
    found = problems(load, text)
    assert len(found) == 1
    assert complaint in found[0]


def test_files_that_cannot_be_read(load: Load, write: Callable[..., Path], tmp_path: Path) -> None:
    write(PIPELINE, "quickstart.yaml")
    with pytest.raises(ConfigError, match=r"quikstart.yaml: there is no such pipeline file \(did you mean 'quickstart"):
        load_pipeline("quikstart.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_pipeline(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match="a pipeline is UTF-8 YAML"):
        load_pipeline("latin.yaml")


# -- files that extend others ----------------------------------------------------------------------------------------


def test_a_small_difference_can_change_add_and_remove(load: Load, write: Callable[..., Path]) -> None:
    write(PIPELINE, "base.yaml")
    pipeline = load(
        """\
        extends: base.yaml
        stages:
          slic: ~
          warmup: {epochs: 5}
          more: {uses: superpixels, images: scenes, region_size: 9}
        """
    )
    assert list(pipeline.stages) == ["scenes", "warmup", "embeddings", "near", "cotap", "more"]
    assert pipeline.stages["warmup"].stage.config.epochs == 5
    assert pipeline.name == "p"


def test_a_removed_stage_that_is_still_read_is_named(load: Load, write: Callable[..., Path]) -> None:
    write(PIPELINE, "base.yaml")
    found = problems(load, "extends: base.yaml\nstages: {near: ~}")
    assert found == [
        "base.yaml:27: stages.cotap.method.neighbors: no stage is called 'near' "
        "(there are cotap, embeddings, scenes, slic, warmup)"
    ]


def test_null_takes_away_what_another_method_does_not_have(load: Load, write: Callable[..., Path]) -> None:
    write(PIPELINE, "base.yaml")
    small = "extends: base.yaml\nstages: {cotap: {clip: ~, method: {name: plain, neighbors: ~}}}"
    config = load(small).stages["cotap"].stage.config
    assert (config.method.name, config.clip) == ("plain", None)
    # Only a key that an extended file has set can be removed: a misspelt key is an error, also with null.
    found = problems(load, small.replace("clip: ~", "clp: ~"))
    assert found == ["p.yaml:2: stages.cotap.clp: unknown key 'clp' (did you mean 'clip'?)"]


def test_problems_point_to_the_file_that_set_the_value(load: Load, write: Callable[..., Path]) -> None:
    write(PIPELINE.replace("region_size: 20", "region_size: x"), "base.yaml")
    found = problems(load, "extends: base.yaml\nstages: {near: {k: many}}")
    assert [line.split(": ")[:2] for line in found] == [
        ["base.yaml:9", "stages.slic.region_size"],
        ["p.yaml:2", "stages.near.k"],
    ]


def test_a_problem_of_a_file_that_two_others_extend_is_told_once(load: Load, write: Callable[..., Path]) -> None:
    write(PIPELINE + "store: twice\n", "base.yaml")
    write("extends: base.yaml\n", "left.yaml")
    write("extends: base.yaml\n", "right.yaml")
    (found,) = problems(load, "extends: [left.yaml, right.yaml]")
    assert found.startswith("base.yaml:29: store: key 'store' is there twice, first in line 1")


def test_overrides_are_checked_like_the_file(load: Load) -> None:
    assert load(PIPELINE, "stages.slic.region_size=16").stages["slic"].stage.config.region_size == 16
    found = problems(load, PIPELINE, "stages.slic.region_sise=16", "stages.slic.resources.cpus=-1")
    assert found == [
        "--set stages.slic.region_sise=16: stages.slic.region_sise: unknown key 'region_sise' "
        "(did you mean 'region_size'?)",
        "--set stages.slic.resources.cpus=-1: stages.slic.resources.cpus: must be greater than 0, got -1 "
        "(CPUs for one worker or task; default: the stage's own choice)",
    ]


# -- stage types -----------------------------------------------------------------------------------------------------


def test_stage_types_can_be_given(write: Callable[..., Path]) -> None:
    given: dict[str, type[Stage]] = {"mine": STAGES["ingest"]}
    pipeline = load_pipeline(write("stages: {a: {uses: mine, source: x}}"), stage_types=given)
    assert pipeline.stages["a"].uses == "mine"


def test_a_stage_type_that_cannot_be_imported_is_a_problem(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    from pipeline.config import registry

    broken = EntryPoint("broken", "no_such_package.stages:Broken", "tessera.stages")
    monkeypatch.setattr(registry, "entry_points", lambda group: [broken])
    (found,) = problems(load, "stages: {a: {uses: broken}}")
    assert "stages.a.uses: 'broken' (no_such_package.stages:Broken, from its package) cannot be imported" in found
    assert "No module named 'no_such_package'" in found


@pytest.mark.parametrize("module", ["pipeline.config.load", "pipeline.plan.plan", "pipeline.config.schema"])
def test_planning_imports_nothing_heavy(module: str) -> None:
    """The installed stages' own settings included."""
    code = f"""
import sys, {module}
from pipeline.config import registry
for name in registry.names(registry.STAGES):
    registry.load(registry.STAGES, name)
for name in registry.names("tessera.methods"):
    registry.load("tessera.methods", name)
heavy = {{"torch", "ray", "mlflow", "cv2", "timm", "pyarrow", "pandas", "omegaconf", "sklearn", "matplotlib"}}
print("heavy:", sorted(heavy & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "heavy: []" in done.stdout, done.stdout
