"""docs/methods.md against the code: every citation of it finds its heading, every option and every default is as the
settings classes have it, every golden file is named.

A table of options stands below a line "Options of `cotap` (`CoTAPSettings`), ...:", which names an entry point, a
class, or both. Its first column holds the option's dotted name in YAML, its second the default in YAML, or "required",
or "below" where the next rows are the default. A settings class that has a table of its own is one row in the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_jsonable_python

from pipeline.stage import arms, field_name

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "methods.md"
GROUPS = ("tessera.methods", "tessera.stages")
CITING = ("pipeline", "stages", "tests", "configs")
WRITTEN = {".py", ".md", ".yaml", ".yml"}

Table = dict[str, str]  # option -> default, as written


def test_headings_are_unique() -> None:
    slugs = [slug(title) for title in headings()]
    assert sorted(set(slugs)) == sorted(slugs)


def test_links_within_the_page_resolve() -> None:
    anchors = {slug(title) for title in headings()}
    links = re.findall(r"\]\(#([^)]*)\)", PAGE.read_text(encoding="utf-8"))
    assert links
    dangling = sorted({link for link in links if link not in anchors})
    assert not dangling, f"links to no heading of docs/methods.md: {dangling}"


def test_citations_of_the_page_name_headings() -> None:
    anchors = {slug(title) for title in headings()}
    wrong = [
        f"{path.relative_to(ROOT)}: #{anchor}"
        for path, text in citing_files()
        for anchor in re.findall(r"methods\.md#([\w-]+)", text)
        if anchor not in anchors
    ]
    assert not wrong, "citations of no heading of docs/methods.md:\n" + "\n".join(wrong)


def test_nothing_cites_a_page_that_is_not_here() -> None:
    """By its path, docs/methods.md, and by an anchor: no section numbers."""
    bare = [
        f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, found.start()) + 1}: {found.group().split(chr(10))[0]}"
        for path, text in citing_files()
        for found in re.finditer(r"(?<!docs/)\bmethods\.md\b[^\n]{0,12}|docs/methods\.md\s+\d", text)
    ]
    assert not bare, "cite docs/methods.md#anchor instead:\n" + "\n".join(bare)


def test_paths_of_the_page_exist() -> None:
    paths = re.findall(r"`((?:stages|pipeline|tests|configs)/[\w./-]+)`", PAGE.read_text(encoding="utf-8"))
    assert paths
    missing = sorted({path for path in paths if not (ROOT / path).exists()})
    assert not missing, f"docs/methods.md names what does not exist: {missing}"


def test_every_golden_file_is_named() -> None:
    files = sorted(path.name for path in (ROOT / "tests" / "golden" / "data").glob("*.npz"))
    page = PAGE.read_text(encoding="utf-8")
    assert files
    missing = [name for name in files if f"`{name}`" not in page]
    assert not missing, f"docs/methods.md does not name {missing}"


@pytest.mark.parametrize("name", sorted(entry.name for entry in entry_points(group="tessera.methods")))
def test_every_option_of_a_method_is_described(name: str) -> None:
    tables = option_tables()
    assert name in tables, f"docs/methods.md has no table of options for the method {name}"
    wrong = differences(registered()[name], tables[name], tables)
    assert not wrong, f"options of {name} in docs/methods.md:\n" + "\n".join(wrong)


def test_every_evaluation_has_a_table_of_options() -> None:
    tables = option_tables()
    stages = {entry.name: entry.load() for entry in entry_points(group="tessera.stages")}
    missing = [name for name, stage in stages.items() if stage.kind == "metrics" and name not in tables]
    assert not missing, f"docs/methods.md has no table of options for {missing}"


def test_every_table_is_that_of_its_class() -> None:
    tables, classes = option_tables(), registered()
    for found in list(classes.values()):
        classes |= {each.__name__: each for each in reachable(found)}
    unknown = sorted(set(tables) - set(classes))
    assert not unknown, f"tables of options in docs/methods.md of what does not exist: {unknown}"
    wrong = [f"{name}: {each}" for name, table in tables.items() for each in differences(classes[name], table, tables)]
    assert not wrong, "options in docs/methods.md:\n" + "\n".join(wrong)


# ------------------------------------------------------------------------------------------------------- the page
def headings() -> list[str]:
    """The titles of all headings, outside of code blocks."""
    prose = re.sub(r"^```.*?^```$", "", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.findall(r"^#{1,6} +(.+?) *$", prose, flags=re.M)


def slug(title: str) -> str:
    """GitHub's anchor of a heading: lower case, punctuation dropped, spaces to hyphens."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def option_tables() -> dict[str, Table]:
    """Every table of options under each of the names that its caption gives it."""
    tables: dict[str, Table] = {}
    pattern = r"^Options of (?P<names>`[^`]+`(?: \(`[^`]+`\))?)[^\n]*:\n\n(?P<rows>(?:\|[^\n]*\n?)+)"
    for found in re.finditer(pattern, PAGE.read_text(encoding="utf-8"), flags=re.M):
        rows = re.findall(r"^\| `([^`]+)` \| (.*?) \| \S.* \|$", found["rows"], flags=re.M)
        assert len(rows) == found["rows"].count("\n") - 2, f"a row without name, default or meaning: {found['names']}"
        for name in re.findall(r"`([^`]+)`", found["names"]):
            assert name not in tables, f"two tables are called {name}"
            tables[name] = dict(rows)
    return tables


def citing_files() -> Iterator[tuple[Path, str]]:
    paths = [path for folder in CITING for path in sorted((ROOT / folder).rglob("*")) if path.suffix in WRITTEN]
    for path in [ROOT / "README.md", *paths]:
        if path != Path(__file__).resolve():
            yield path, path.read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- the code
def registered() -> dict[str, type[BaseModel]]:
    """Settings of methods and configs of stages, by the name of their entry point."""
    classes = {entry.name: entry.load() for group in GROUPS for entry in entry_points(group=group)}
    return {name: getattr(found, "Config", found) for name, found in classes.items()}


def nested(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes that a field may hold."""
    return [arm for arm, _ in arms(annotation) if isinstance(arm, type) and issubclass(arm, BaseModel)]


def reachable(model: type[BaseModel]) -> set[type[BaseModel]]:
    """A settings class, its bases, and all that are nested in it."""
    found: set[type[BaseModel]] = set()
    waiting = [model]
    while waiting:
        if (each := waiting.pop()) not in found:
            found.add(each)
            waiting += [base for base in each.__mro__ if base is not BaseModel and issubclass(base, BaseModel)]
            waiting += [inner for info in each.model_fields.values() for inner in nested(info.annotation)]
    return found


def differences(model: type[BaseModel], table: Table, tables: dict[str, Table]) -> list[str]:
    """What a class and its table disagree about, in words."""
    expected = dict(options(model, tables))
    wrong = [f"`{name}` is not described" for name in expected if name not in table]
    wrong += [f"`{name}` is no option" for name in table if name not in expected]
    for name in expected.keys() & table.keys():
        if table[name] != "below" and not same_default(table[name], expected[name]):
            wrong.append(f"`{name}` is {to_jsonable_python(expected[name])!r} by default, the page says {table[name]}")
    return sorted(wrong)


def same_default(written: str, default: Any) -> bool:
    if default is PydanticUndefined:
        return written == "required"
    return written.startswith("`") and yaml.safe_load(written.strip("`")) == to_jsonable_python(default)


def options(
    model: type[BaseModel], tables: dict[str, Table], prefix: str = "", value: BaseModel | None = None
) -> Iterator[tuple[str, Any]]:
    """Dotted names and defaults of the rows that a class's table must have.

    Options that a base class with a table of its own describes, with the same default, may be left to that one.

    Args:
        prefix: dotted name of the field that holds `model`, with a dot at its end.
        value: what that field holds by default; None: nothing, and the class's own defaults count.
    """
    bases = [base for base in model.__mro__[1:] if base.__name__ in tables and issubclass(base, BaseModel)]
    for name, info in model.model_fields.items():
        default = info.get_default(call_default_factory=True) if value is None else getattr(value, name)
        if any(described_by(base, name, default) for base in bases):
            continue
        inner = [each for each in nested(info.annotation) if each.__name__ not in tables]
        inner = [each for each in inner if getattr(each, "variant_group", None) is None]
        path = prefix + field_name(name, info)
        if not inner or any(arm is type(None) for arm, _ in arms(info.annotation)):
            yield path, default
        for each in inner:
            yield from options(each, tables, f"{path}.", default if isinstance(default, each) else None)


def described_by(base: type[BaseModel], name: str, default: Any) -> bool:
    if name not in base.model_fields:
        return False
    inherited = base.model_fields[name].get_default(call_default_factory=True)
    # `name` is what chooses the class: required in the base, fixed in every method.
    return bool(inherited == default) or (name == "name" and inherited is PydanticUndefined)
