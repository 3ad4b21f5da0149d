"""The JSON schema accepts what loads and refuses what an editor should underline."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml

from pipeline.config.schema import pipeline_schema
from tests.conftest import ROOT
from tests.pipeline.pipelines import PIPELINE


@pytest.fixture
def schema(registered: None) -> dict[str, Any]:
    return pipeline_schema()


def errors(schema: dict[str, Any], text: str) -> list[str]:
    validator = jsonschema.Draft202012Validator(schema)
    return [
        ".".join(map(str, leaf.absolute_path)) + ": " + leaf.message
        for error in validator.iter_errors(yaml.safe_load(text))
        for leaf in (error.context or [error])
    ]


def test_it_is_a_schema_and_json(schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    json.dumps(schema)


def test_a_pipeline_passes(schema: dict[str, Any]) -> None:
    assert errors(schema, PIPELINE) == []


@pytest.mark.parametrize(
    "text",
    [
        "extends: base.yaml",
        "{extends: [a.yaml, b.yaml], stages: {slic: {region_size: 9}}}",
        "{extends: base.yaml, stages: {slic: ~}}",
        "{tracking: ~, stages: {s: {uses: ingest, source: x}}}",
        "{stages: {p: {uses: pretrain, images: a, method: {name: near, neighbors: n, host: {name: plain}}}}}",
    ],
)
def test_differences_nulls_and_nested_methods_pass(schema: dict[str, Any], text: str) -> None:
    assert errors(schema, text) == []


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("store: somewhere", "stor: x", "'stor' was unexpected"),
        ("uses: superpixels", "uses: superpixel", "stages.slic.uses: 'superpixel' is not one of"),
        ("region_size: 20", "region_sise: 20", "stages.slic: Additional properties are not allowed ('region_sise'"),
        ("region_size: 20", "region_size: big", "stages.slic.region_size: 'big' is not of type 'integer'"),
        ("name: near\n", "name: nea\n", "stages.cotap.method.name: 'nea' is not one of ['near', 'plain']"),
        ("neighbors: near", "neighbours: near", "stages.cotap.method: "),
        ("{name: plain}", "{name: plain, host: {name: plain}}", "stages.warmup.method: "),
        ("{from: scenes, weight: 2}", "{form: scenes}", "stages.cotap.images"),
        ("  slic:", "  SLIC:", "does not match"),
    ],
)
def test_what_does_not_load_is_refused(schema: dict[str, Any], old: str, new: str, place: str) -> None:
    found = errors(schema, PIPELINE.replace(old, new, 1))
    assert any(place in line for line in found), found


def test_inputs_and_sources_describe_themselves(schema: dict[str, Any]) -> None:
    text = json.dumps(schema)
    assert "the name of a stage of kind neighbors" in text
    assert "folder of images" in text


@pytest.fixture(scope="module")
def installed() -> dict[str, Any]:
    """The schema of the stage types that Tessera has."""
    return pipeline_schema()


def test_the_projects_own_pipelines_pass(installed: dict[str, Any]) -> None:
    files = [file for file in (ROOT / "configs").rglob("*.yaml") if "\nspace:" not in file.read_text()]  # of a sweep
    assert files
    assert {str(file): errors(installed, file.read_text()) for file in files} == {str(file): [] for file in files}


def test_a_stage_without_a_type_is_refused_unless_the_file_extends_another(installed: dict[str, Any]) -> None:
    assert errors(installed, "{stages: {p: {k: 3}}}") == ["stages.p: 'uses' is a required property"]
    assert errors(installed, "{extends: base.yaml, stages: {p: {k: 3}}}") == []


@pytest.mark.parametrize(
    "settings", ["init: i", "init: i, steps: 1, epochs: 1", "steps: 1", "init: i, backbone: {name: resnet18}, steps: 1"]
)
def test_fields_that_exclude_each_other_are_refused(installed: dict[str, Any], settings: str) -> None:
    text = "{stages: {p: {uses: pretrain, images: a, method: {name: dino}, %s}}}"
    assert errors(installed, text % "init: i, steps: 1, epochs: null") == []
    assert any(line.startswith("stages.p: ") for line in errors(installed, text % settings))


def test_the_installed_stages_have_a_schema(installed: dict[str, Any]) -> None:
    schema = installed
    jsonschema.Draft202012Validator.check_schema(schema)
    found = errors(schema, "{stages: {p: {uses: pretrain, images: a, init: b, method: {name: dino, wat: 1}}}}")
    assert any("wat" in line and line.startswith("stages.p.method") for line in found), found


def descriptions(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("description"), str):
            yield value["description"]
        for item in value.values():
            yield from descriptions(item)
    elif isinstance(value, list):
        for item in value:
            yield from descriptions(item)


def test_the_texts_of_the_schema_speak_of_yaml_and_of_files_that_a_clone_has() -> None:
    texts = set(descriptions(pipeline_schema()))
    assert len(texts) > 200
    for text in texts:
        for path in re.findall(r"[\w./-]+\.(?:py|md|yaml)\b", text):
            assert (ROOT / path).is_file(), f"{path} in: {text}"
        assert not re.search(r"\b(None|True|shared/|issue|session)\b", text), text


def test_the_schema_says_what_paths_are_relative_to() -> None:
    schema = pipeline_schema()
    keys = schema["properties"]
    assert "relative to the file that holds this key" in keys["extends"]["description"]
    assert "relative to the working folder, also in --set" in keys["store"]["description"]
    assert "a path (from the working folder) or" in json.dumps(schema["$defs"])


def test_a_repeated_stage_may_have_variables_for_numbers(schema: dict[str, Any]) -> None:
    text = '{{for_each: {{n: [8, 9]}}, stages: {{"slic_{{n}}": {{uses: {}, images: s, region_size: "{{n}}"}}}}}}'
    assert errors(schema, text.format("superpixels")) == []
    assert errors(schema, text.format("superpixel")) != []
