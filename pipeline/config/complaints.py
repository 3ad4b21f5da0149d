"""What pydantic says about a stage's config, in the words of a pipeline file: place, rule, remedy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from pipeline.config.document import Complaints, Key, Node, nearest
from pipeline.config.registry import variant
from pipeline.stage import InputKind, Settings, arms, field_name

# "Input should be a valid integer, unable to parse ..." in words for somebody who wrote YAML.
WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a word",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "model": "a mapping",
}


def add_problems(
    error: ValidationError, config: type[Settings], node: Node, path: tuple[Key, ...], complaints: Complaints
) -> None:
    """Add one complaint for each broken rule of a stage.

    Args:
        error: what pydantic found.
        config: the stage type's config class.
        node: what was written for the stage, without `uses`.
        path: of the stage in the file.
        complaints: where they go.
    """
    found: dict[tuple[Key, ...], list[ErrorDetails]] = {}
    for details in error.errors(include_url=False, include_context=False):
        found.setdefault(_yaml_path(details["loc"], details["type"], node.plain()), []).append(details)
    for where, several in found.items():
        through_union = len(several) > 1 or len(several[0]["loc"]) > len(where)
        if through_union and any(other[: len(where)] == where and len(other) > len(where) for other in found):
            continue  # an alternative of a union that was not meant: the one that was meant has more to say, below
        first = several[0]
        model, info = _field_at(config, node.plain(), where)
        if first["type"] == "extra_forbidden":
            known = [field_name(*field) for field in model.model_fields.items()] if model else []
            rule, remedy = f"unknown key {where[-1]!r}", nearest(str(where[-1]), known)
        elif first["type"] == "missing":
            rule, remedy = f"{where[-1]!r} is missing", _what_it_is(info)
        else:
            rule = " or ".join(dict.fromkeys(_rule(details) for details in several)) + _got(first)
            remedy = _remedy(first, info)
            if first["type"] == "value_error":
                where, rule = _with_its_field(config, node.plain(), where, rule)
        place = node.place_of(where)
        complaints.add((*path, *where), rule, remedy, place)


def _yaml_path(location: tuple[Key, ...], kind: str, data: Any) -> tuple[Key, ...]:
    """Pydantic's location without what it puts between the keys: the names of unions' alternatives and validators."""
    path: list[Key] = []
    for i, key in enumerate(location):
        in_mapping = isinstance(data, dict) and key in data
        if in_mapping or (isinstance(data, list) and isinstance(key, int) and key < len(data)):
            data = data[key]
        elif not (kind == "missing" and i == len(location) - 1):
            continue
        path.append(key)
    return tuple(path)


def _field_at(
    config: type[Settings], data: Any, path: tuple[Key, ...]
) -> tuple[type[Settings] | None, FieldInfo | None]:
    """The settings class that holds the last key of `path`, and its field there; None where neither can be told."""
    model: type[Settings] | None = config
    info: FieldInfo | None = None
    annotation: Any = config
    for i, key in enumerate(path):
        if model is None:  # inside a list or a mapping: its items' type
            annotation = next((item for item in _items(annotation)), Any)
        else:
            info = next((field for name, field in model.model_fields.items() if field_name(name, field) == key), None)
            annotation = info.annotation if info else Any
        data = _step(data, key)
        if i < len(path) - 1:
            model = None if isinstance(data, list) else variant(annotation, data)
    return model, info


def _step(data: Any, key: Key) -> Any:
    if isinstance(data, dict):
        return data.get(key)
    return data[key] if isinstance(data, list) and isinstance(key, int) and key < len(data) else None


def _items(annotation: Any) -> Iterator[Any]:
    for arm, _ in arms(annotation):
        arguments = [part for part in getattr(arm, "__args__", ()) if part is not Ellipsis]
        if arguments:
            yield arguments[-1]


def _rule(details: ErrorDetails) -> str:
    kind = details["type"]
    if kind in ("value_error", "assertion_error"):
        return details["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if kind.endswith(("_type", "_parsing", "_from_float")) and (words := WORDS.get(kind.split("_")[0])):
        return f"must be {words}"
    return details["msg"].replace("Input should be", "must be").replace("Input should", "must")


def _got(details: ErrorDetails) -> str:
    value = details["input"]
    if details["type"] in ("value_error", "assertion_error") or isinstance(value, Settings):
        return ""
    if isinstance(value, dict):
        return ", got a mapping"
    if isinstance(value, list):
        return f", got a list of {len(value)}"
    return ", got nothing" if value is None else f", got {value!r}"


def _with_its_field(
    config: type[Settings], data: Any, where: tuple[Key, ...], rule: str
) -> tuple[tuple[Key, ...], str]:
    """Path and rule of a message about a whole mapping that begins with the name of one of its fields."""
    name, colon, rest = rule.partition(": ")
    model, _ = _field_at(config, data, (*where, "_"))
    fields = [field_name(*field) for field in model.model_fields.items()] if model else []
    return ((*where, *name.split(".")), rest) if colon and name.split(".")[0] in fields else (where, rule)


def _remedy(details: ErrorDetails, info: FieldInfo | None) -> str:
    if details["type"] in ("literal_error", "enum") and isinstance(details["input"], str) and info is not None:
        choices = [str(choice) for arm, _ in arms(info.annotation) for choice in getattr(arm, "__args__", ())]
        close = nearest(details["input"], choices)
        if close.startswith("did"):
            return close
    return (info.description or "") if info else ""


def _what_it_is(info: FieldInfo | None) -> str:
    if info is None:
        return ""
    for _, marks in arms(info.annotation, tuple(info.metadata)):
        for mark in marks:
            if isinstance(mark, InputKind):
                return f"name a stage of kind {' or '.join(mark.kinds)}"
    return info.description or "set it"
