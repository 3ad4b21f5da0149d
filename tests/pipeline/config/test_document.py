"""YAML with lines: scalars, repeated keys, aliases, extends, merging and overrides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.document import Complaints, Node, merge, override, parse, read

TOP = ("stages", "store")


def parsed(text: str) -> Any:
    complaints = Complaints()
    node = parse(text, "f.yaml", complaints)
    assert complaints == []
    return node.plain()


def complaints_of(text: str) -> list[str]:
    complaints = Complaints()
    parse(text, "f.yaml", complaints)
    return [str(problem) for problem in complaints]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("-1.5E+2", -150.0),
        ("007", 7),
        ("0x1f", 31),
        ("0o17", 15),
        ("-.inf", float("-inf")),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("~", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("'1'", "1"),
        ("1.2.3", "1.2.3"),
        ("s3://b/k", "s3://b/k"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    assert parsed(f"a: {text}") == {"a": value}
    assert type(parsed(f"a: {text}")["a"]) is type(value)


def test_keys_are_words_and_merge_keys_work() -> None:
    assert parsed("base: &b {x: 1, y: 2}\na: {<<: *b, y: 3}\n0: zero\n") == {
        "base": {"x": 1, "y": 2},
        "a": {"x": 1, "y": 3},
        "0": "zero",
    }


def test_places() -> None:
    node = parse("a:\n  b: 1\n  c:\n    - x\n    - {d: 2}\n", "f.yaml", Complaints())
    lines = {path: node.place_of(path).line for path in [("a", "b"), ("a", "c", 0), ("a", "c", 1, "d"), ("a", "zz")]}
    assert lines == {("a", "b"): 2, ("a", "c", 0): 4, ("a", "c", 1, "d"): 5, ("a", "zz"): 1}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3: a: key 'a' is there twice, first in line 1 (keep one of them)"),
        ("a: {b: 1, b: 1}\n", "f.yaml:1: a.b: key 'b' is there twice, first in line 1 (keep one of them)"),
        ("a: !!python/object:os.system {}\n", "the tag tag:yaml.org,2002:python/object:os.system is not plain data"),
        ("a: !secret x\n", "f.yaml:1: a: the tag !secret is not plain data (remove it)"),
        ("a: !!int x\n", "f.yaml:1: a: the tag tag:yaml.org,2002:int is not plain data"),
        ("a: &x [*x]\n", "f.yaml:1: a.0: an alias contains itself (write the values out)"),
        ("a: [1\nb: 2\n", "f.yaml:2: not valid YAML: "),
        ("a: 1\n---\nb: 1\n", "not valid YAML: "),
        ("? [a, b]\n: 1\n", "f.yaml:1: a key is a list or a mapping"),
        ("a: \x01\n", "f.yaml: not valid YAML: "),
    ],
)
def test_what_is_not_plain_data_is_named(text: str, complaint: str) -> None:
    found = complaints_of(text)
    assert len(found) == 1
    assert complaint in found[0]


def test_aliases_cannot_multiply_without_end() -> None:
    levels = "\n".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 9))
    found = complaints_of(f"l0: &l0 [x]\n{levels}\n")
    assert len(found) == 1
    assert "more than 50000 values" in found[0]


# -- merging ---------------------------------------------------------------------------------------------------------


def merged(base: str, over: str) -> Any:
    complaints = Complaints()
    return merge(parse(base, "b", complaints), parse(over, "o", complaints)).plain()


def test_mappings_merge_and_lists_replace() -> None:
    assert merged("{a: {x: 1, y: [1, 2]}, b: 1}", "{a: {y: [3]}, c: 2}") == {"a": {"x": 1, "y": [3]}, "b": 1, "c": 2}


def test_another_type_of_stage_replaces_the_old_one_whole() -> None:
    assert merged("{s: {uses: a, x: 1}}", "{s: {uses: b, y: 2}}") == {"s": {"uses": "b", "y": 2}}
    assert merged("{s: {uses: a, x: 1}}", "{s: {uses: a, y: 2}}") == {"s": {"uses": "a", "x": 1, "y": 2}}


def test_null_replaces_and_is_marked_only_over_something() -> None:
    complaints = Complaints()
    node = merge(parse("{a: 1}", "b", complaints), parse("{a: ~, b: ~}", "o", complaints))
    assert node.plain() == {"a": None, "b": None}
    assert [node.value[key].removes for key in "ab"] == [True, False]


# -- extends ---------------------------------------------------------------------------------------------------------


def read_all(path: Path) -> tuple[Node, list[str]]:
    complaints = Complaints()
    return read(path, complaints), [str(problem) for problem in complaints]


def test_extends_is_relative_to_the_file_and_later_bases_win(write: Callable[..., Path]) -> None:
    write("a: 1\nb: 1\nc: 1\nname: base\ndescription: d\n", "base/one.yaml")
    write("extends: one.yaml\nb: 2\n", "base/two.yaml")
    write("c: 3\nb: 3\n", "three.yaml")
    node, complaints = read_all(write("extends: [base/two.yaml, three.yaml]\nd: 4\n", "p.yaml"))
    assert complaints == []
    assert node.plain() == {"a": 1, "b": 3, "c": 3, "d": 4, "extends": ["base/two.yaml", "three.yaml"]}
    places = {key: (Path(child.place.file).name, child.place.line) for key, child in node.value.items()}
    assert places["a"] == ("one.yaml", 1)
    assert places["b"] == ("three.yaml", 2)
    assert places["d"] == ("p.yaml", 2)


def test_a_ring_of_files_is_named(write: Callable[..., Path]) -> None:
    write("extends: b.yaml\n", "a.yaml")
    write("extends: c.yaml\n", "b.yaml")
    write("\nextends: [a.yaml]\n", "c.yaml")
    _, complaints = read_all(Path("a.yaml"))
    assert complaints == [
        "c.yaml:2: extends: files extend each other: a.yaml -> b.yaml -> c.yaml -> a.yaml (remove one of these extends)"
    ]


def test_a_missing_base_is_named_with_the_nearest_file(write: Callable[..., Path]) -> None:
    write("a: 1\n", "quickstart.yaml")
    _, complaints = read_all(write("extends: quikstart.yaml\n", "p.yaml"))
    assert complaints == ["p.yaml:1: extends: no file quikstart.yaml (did you mean 'quickstart.yaml'?)"]


def test_extends_must_name_files(write: Callable[..., Path]) -> None:
    _, complaints = read_all(write("extends: [1]\n", "p.yaml"))
    assert complaints == ["p.yaml:1: extends: expected a file or a list of files, got 1"]


# -- overrides -------------------------------------------------------------------------------------------------------

BASE = "{stages: {slic: {uses: superpixels, size: 20, images: [{from: a}, {from: b}], init: ~}}}"


def overridden(*texts: str) -> tuple[Any, list[str]]:
    complaints = Complaints()
    node = parse(BASE, "f.yaml", complaints)
    for text in texts:
        node = override(node, text, complaints, TOP)
    return node.plain()["stages"], [str(problem) for problem in complaints]


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("stages.slic.size=1e-2", ["slic", "size"], 0.01),
        ("stages.slic.size='7'", ["slic", "size"], "7"),
        ("stages.slic.size=[1, {a: b}]", ["slic", "size"], [1, {"a": "b"}]),
        ("stages.slic.size=", ["slic", "size"], None),
        ("stages.slic.note=a=b", ["slic", "note"], "a=b"),
        ("stages.slic.images.1.from=c", ["slic", "images", 1, "from"], "c"),
        ("stages.slic.resources.cpus=2", ["slic", "resources", "cpus"], 2),
        ("stages.slic.init.name=x", ["slic", "init", "name"], "x"),
        ("stages.more={uses: ingest}", ["more"], {"uses": "ingest"}),
        ("stages.more.uses=ingest", ["more"], {"uses": "ingest"}),
    ],
)
def test_overrides(text: str, path: list[str | int], value: Any) -> None:
    stages, complaints = overridden(text)
    assert complaints == []
    for key in path:
        stages = stages[key]
    assert stages == value


def test_overrides_apply_in_order_and_leave_the_rest_alone() -> None:
    stages, _ = overridden("stages.slic.size=1", "stages.slic.size=2")
    assert stages["slic"] == {"uses": "superpixels", "size": 2, "images": [{"from": "a"}, {"from": "b"}], "init": None}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("stages.slicc.size=1", "no stage is called 'slicc' (did you mean 'slic'?)"),
        ("stage.slic.size=1", "no top-level key 'stage' (did you mean 'stages'?)"),
        ("stages.slic.images.2.from=c", "stages.slic.images is a list of 2, it has no item '2' (items are 0 to 1)"),
        ("stages.slic.images.x=c", "stages.slic.images is a list of 2, it has no item 'x'"),
        ("stages.slic.size.x=c", "stages.slic.size is 20, nothing can be set below it"),
        ("stages.slic.size", "expected path=value"),
        ("stages..size=1", "expected path=value"),
        ("stages.slic.size=[1", "not valid YAML"),
    ],
)
def test_wrong_overrides_are_named(text: str, complaint: str) -> None:
    _, complaints = overridden(text)
    assert len(complaints) == 1
    assert complaint in complaints[0]
    assert complaints[0].startswith(f"--set {text}: ")
