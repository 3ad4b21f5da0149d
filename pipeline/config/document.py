"""YAML as a tree that knows where every value was written, with `extends` and `--set` applied.

Reads plain data only (YAML 1.2 scalars, no tags); what the keys mean is for load.py to say. Problems are collected and
not raised one by one, so that the user gets to know all of them at once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from pipeline.errors import Problem

Key: TypeAlias = "str | int"

MOST_NAMES = 8  # shown of a folder
MAX_NODES = 50_000  # aliases can multiply a small file without end


@dataclass(frozen=True)
class Place:
    """Where a value was written."""

    file: str
    line: int | None = None  # 1-based; None for an override, which is its own place


@dataclass(frozen=True)
class Node:
    """One value of a document. `value` is a dict or list of nodes, or a scalar."""

    value: Any
    place: Place
    removes: bool = False  # a null that took the place of something in a file it extends

    def plain(self) -> Any:
        """The same value as dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def place_of(self, path: Iterable[Key]) -> Place:
        """Where `path` was written or, if it was not, the nearest value above it."""
        node = self
        for key in path:
            child = node.child(key)
            if child is None:
                break
            node = child
        return node.place

    def child(self, key: Key) -> Node | None:
        """The value under a key, or at an index; None when there is none."""
        if isinstance(self.value, dict):
            return self.value.get(str(key))
        if isinstance(self.value, list) and str(key).isdigit() and int(key) < len(self.value):
            return self.value[int(key)]
        return None


class Complaints(list[Problem]):
    """The problems of a file, collected while it is read."""

    def add(self, path: Iterable[Key] | str, rule: str, remedy: str = "", place: Place | None = None) -> None:
        """Add one problem; see `Problem` for what its fields mean."""
        dotted = path if isinstance(path, str) else ".".join(map(str, path))
        where = place or Place("")
        self.append(Problem(dotted, rule, remedy, where.file, where.line))


def nearest(word: str, known: Iterable[str]) -> str:
    """The remedy for a name that does not exist: the one that was probably meant, or all that there are."""
    names = sorted(map(str, known))
    close = difflib.get_close_matches(str(word), names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"there are {', '.join(names)}" if names else ""


def nearest_path(path: str | Path, pattern: str = "*") -> str:
    """The remedy for a local path that leads nowhere: the one that was probably meant, or what is in its folder.

    Looked for from the nearest folder above it that exists.

    Args:
        path: as written; relative ones to the working folder.
        pattern: of the names that may stand last.
    """
    found, missing = Path(path), []
    while not found.is_dir() and found != found.parent:
        missing.append(found.name)
        found = found.parent
    folder = found
    while missing:
        name = missing.pop()
        inside = [entry.name for entry in _listed(found, "*" if missing else pattern) if not missing or entry.is_dir()]
        stems = {Path(other).stem: other for other in sorted(inside)}  # endings alike would make any two names close
        close = difflib.get_close_matches(Path(name).stem, stems, n=1, cutoff=0.6)
        if name in inside:
            found = found / name
        elif close:
            found = found / stems[close[0]]
        else:
            names = sorted(entry.name for entry in _listed(folder, pattern))
            shown = ", ".join(names[:MOST_NAMES]) + (", ..." if len(names) > MOST_NAMES else "")
            return f"{'this folder' if folder == Path() else folder} has {shown}" if names else ""
    return f"did you mean {str(found)!r}?"


def _listed(folder: Path, pattern: str) -> list[Path]:
    try:
        return [entry for entry in folder.glob(pattern) if not entry.name.startswith(".")]
    except OSError:
        return []


# -- reading ---------------------------------------------------------------------------------------------------------


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """A safe loader whose scalars follow YAML 1.2: `no` is a word, `1e-3` a number, a date a string."""

    yaml_implicit_resolvers: dict[str, Any] = {}


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def parse(text: str, file: str, complaints: Complaints, *, line: bool = True) -> Node:
    """The document in `text`. Broken YAML, repeated keys, unknown tags and endless aliases become complaints.

    Args:
        text: YAML.
        file: what to call it in complaints.
        complaints: where they go.
        line: whether line numbers mean something to the user (not in a `--set` value).
    """
    empty = Node(None, Place(file, 1 if line else None))
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        column = f", at column {mark.column + 1}" if mark and line else ""
        rule, remedy = f"not valid YAML: {error.problem or error.context}{column}", ""
        if mark and _at(text, mark) == "\t":
            rule, remedy = f"not valid YAML: a tab{column}", "indent with spaces"
        complaints.add("", rule, remedy, Place(file, mark.line + 1 if mark and line else None))
        return empty
    except yaml.YAMLError as error:
        complaints.add("", f"not valid YAML: {' '.join(str(error).split())}", place=Place(file))
        return empty
    return _Reader(file, complaints, line).read(root, ()) if root is not None else empty


def _at(text: str, mark: yaml.Mark) -> str:
    """The character at a mark; "" at the end."""
    return "".join(text.split("\n")[mark.line : mark.line + 1])[mark.column : mark.column + 1]


class _Reader:
    def __init__(self, file: str, complaints: Complaints, line: bool) -> None:
        self.file, self.complaints, self.line = file, complaints, line
        self.open: set[int] = set()
        self.nodes = 0

    def place(self, node: yaml.Node) -> Place:
        return Place(self.file, node.start_mark.line + 1 if self.line else None)

    def read(self, node: yaml.Node, path: tuple[Key, ...], key: yaml.Node | None = None) -> Node:
        place = self.place(key or node)
        self.nodes += 1
        if id(node) in self.open or self.nodes > MAX_NODES:
            if self.nodes <= MAX_NODES + 1:
                rule = "an alias contains itself" if id(node) in self.open else f"more than {MAX_NODES} values"
                self.complaints.add(path, rule, "write the values out", place)
            return Node(None, place)
        if isinstance(node, yaml.ScalarNode):
            return Node(self.scalar(node, path), place)
        if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            self.complaints.add(path, f"the tag {node.tag} is not plain data", "remove it", place)
        self.open.add(id(node))
        value: Any
        if isinstance(node, yaml.MappingNode):
            value = self.mapping(node, path)
        else:
            value = [self.read(item, (*path, i)) for i, item in enumerate(node.value)]
        self.open.discard(id(node))
        return Node(value, place)

    def mapping(self, node: yaml.MappingNode, path: tuple[Key, ...]) -> dict[str, Node]:
        found: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key, item in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.complaints.add(path, "a key is a list or a mapping", "keys are words", self.place(key))
            elif key.value == "<<":
                several = item.value if isinstance(item, yaml.SequenceNode) else [item]
                for one in reversed(several):  # the first mapping named wins
                    taken = self.read(one, (*path, "<<"), key)
                    if not isinstance(taken.value, dict):
                        self.complaints.add((*path, "<<"), "merges something that is no mapping", place=self.place(key))
                        continue
                    merged |= taken.value
            elif key.value in found:
                first = found[key.value].place.line
                rule = f"key {key.value!r} is there twice" + (f", first in line {first}" if first else "")
                self.complaints.add((*path, key.value), rule, "keep one of them", self.place(key))
            else:
                found[key.value] = self.read(item, (*path, key.value), key)
        return merged | found

    def scalar(self, node: yaml.ScalarNode, path: tuple[Key, ...]) -> Any:
        kind, text = node.tag.removeprefix("tag:yaml.org,2002:"), str(node.value)
        if kind == "str":
            return text
        if kind == "null":
            return None
        try:
            if kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            if kind == "int":
                return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
            if kind == "float":
                special = re.fullmatch(r"([-+]?)\.(inf|nan)", text, re.IGNORECASE)
                return float(special[1] + special[2] if special else text)
        except (KeyError, ValueError):  # an explicit tag on a value it does not fit: `!!int abc`
            pass
        self.complaints.add(path, f"the tag {node.tag} is not plain data", "remove it", self.place(node))
        return None


# -- extends ---------------------------------------------------------------------------------------------------------

NOT_INHERITED = ("name", "description", "extends")  # they say which file this is


def read(file: Path, complaints: Complaints) -> Node:
    """The document in `file`, on top of the ones that it extends.

    Raises:
        OSError, UnicodeDecodeError: `file` itself cannot be read.
    """
    return _read(file, complaints, ())


def _read(file: Path, complaints: Complaints, chain: tuple[Path, ...]) -> Node:
    chain = (*chain, file)
    own = parse(file.read_text(encoding="utf-8"), str(file), complaints)
    extends = own.child("extends")
    if extends is None or extends.value is None:
        return own
    bases = extends.value if isinstance(extends.value, list) else [extends]
    result: Node | None = None
    for base in bases:
        if not isinstance(base.value, str):
            complaints.add("extends", f"expected a file or a list of files, got {base.plain()!r}", place=base.place)
            continue
        target = file.parent / base.value
        known = [link.resolve() for link in chain]
        if target.resolve() in known:
            ring = [*chain[known.index(target.resolve()) :], target]
            rule = f"files extend each other: {' -> '.join(link.name for link in ring)}"
            complaints.add("extends", rule, "remove one of these extends", base.place)
            continue
        try:
            other = _read(target, complaints, chain)
        except FileNotFoundError:
            remedy = nearest_path(target, "*.y*ml") or "the path is relative to the file that names it"
            complaints.add("extends", f"no file {target}", remedy, base.place)
            continue
        except (OSError, UnicodeDecodeError) as error:
            complaints.add("extends", f"cannot read {target}: {error}", place=base.place)
            continue
        if isinstance(other.value, dict):
            other = Node({k: v for k, v in other.value.items() if k not in NOT_INHERITED}, other.place)
        result = other if result is None else merge(result, other)
    return own if result is None else merge(result, own)


def merge(base: Node, over: Node) -> Node:
    """`over` on top of `base`: mappings are merged key by key; everything else, lists too, is replaced.

    A mapping with another `uses` is another type of stage, and replaces the old one as a whole.
    """
    if isinstance(base.value, dict) and isinstance(over.value, dict):
        old, new = base.child("uses"), over.child("uses")
        if old is None or new is None or old.value == new.value:
            merged = dict(base.value)
            for key, node in over.value.items():
                merged[key] = merge(merged[key], node) if key in merged else node
            return Node(merged, over.place)
    removes = over.value is None and (base.value is not None or base.removes)
    return Node(over.value, over.place, removes=removes)


# -- overrides -------------------------------------------------------------------------------------------------------


def override(root: Node, text: str, complaints: Complaints, top_level: Iterable[str]) -> Node:
    """The document with one `--set a.b.c=value` applied. The value is YAML; an item of a list is named by its index.

    Keys below a stage may be new, for a field that was left at its default; whether there is such a field is checked
    with the stage's config. A stage or a top-level key that does not exist is a complaint here.

    Args:
        root: the document.
        text: what follows `--set`.
        complaints: where they go.
        top_level: the keys that a pipeline may have.
    """
    place = Place(f"--set {text}")
    dotted, equals, value_text = text.partition("=")
    path = dotted.strip().split(".")
    if not equals or not all(path):
        complaints.add("", "expected path=value", "for example --set stages.superpixels.region_size=16", place)
        return root
    value = parse(value_text, place.file, complaints, line=False)
    if path[0] not in top_level:
        complaints.add(path, f"no top-level key {path[0]!r}", nearest(path[0], top_level), place)
        return root
    stages = root.child("stages")
    if path[0] == "stages" and len(path) > 1 and stages is not None and isinstance(stages.value, dict):
        whole = path[2:] == ["uses"] or (len(path) == 2 and value.child("uses") is not None)
        if path[1] not in stages.value and not whole:
            complaints.add(path, f"no stage is called {path[1]!r}", nearest(path[1], stages.value), place)
            return root
    return _set(root, path, 0, value, complaints, place)


def _set(node: Node, path: list[str], at: int, value: Node, complaints: Complaints, place: Place) -> Node:
    if at == len(path):
        return Node(value.value, value.place, removes=value.value is None and node.value is not None)
    key, here = path[at], ".".join(path[:at])
    if isinstance(node.value, list):
        child = node.child(key)
        if child is None:
            size = len(node.value)
            rule = f"{here} is a list of {size}, it has no item {key!r}"
            complaints.add(path, rule, f"items are 0 to {size - 1}" if size else "the list is empty", place)
            return node
        items = list(node.value)
        items[int(key)] = _set(child, path, at + 1, value, complaints, place)
        return Node(items, node.place)
    if node.value is not None and not isinstance(node.value, dict):
        rule = f"{here} is {node.value!r}, nothing can be set below it"
        complaints.add(path, rule, f"set {here} itself to a mapping", place)
        return node
    fields = dict(node.value or {})
    fields[key] = _set(fields.get(key, Node(None, place)), path, at + 1, value, complaints, place)
    return Node(fields, node.place)
