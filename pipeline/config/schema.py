"""The JSON schema of a pipeline file, for editors.

It has every installed stage type with its settings and, in them, the settings of every installed method, chosen by
`name`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from pipeline.config import registry
from pipeline.config.load import DEFAULT_STORE, DEFAULT_TRACKING, STAGE_NAME
from pipeline.config.repeat import KEY, VARIABLE
from pipeline.stage import Settings, Stage, arms

DIALECT = "https://json-schema.org/draft/2020-12/schema"
MODE: JsonSchemaMode = "validation"


def pipeline_schema(stage_types: Mapping[str, type[Stage[Any]]] | None = None) -> dict[str, Any]:
    """The schema, for the installed stage types unless others are given.

    What an extended file may supply is not required: in a file with `extends`, a stage without `uses` changes one of
    the extended file, and only `tessera plan` can check it.
    """
    types = stage_types if stage_types is not None else registry.stage_classes()
    variants = {base: _loaded(base) for base in _variant_bases(types[name].Config for name in sorted(types))}
    models: list[type[Settings]] = [types[name].Config for name in sorted(types)]
    models += [model for base, loaded in variants.items() for model in (base, *loaded.values())]
    refs, definitions = models_json_schema([(model, MODE) for model in dict.fromkeys(models)])
    defs = definitions.get("$defs", {})
    for base, loaded in variants.items():
        if base not in loaded.values():
            defs[_key(refs[base, MODE])] = _chosen_by("name", {n: refs[m, MODE] for n, m in loaded.items()}, True)
    for name in types:
        defs[_key(refs[types[name].Config, MODE])].setdefault("properties", {})["uses"] = {"type": "string"}
    stage = _chosen_by("uses", {name: refs[types[name].Config, MODE] for name in sorted(types)}, False)
    return {
        "$schema": DIALECT,
        "title": "Tessera pipeline",
        "type": "object",
        "properties": {
            "name": {"type": "string", "description": "the pipeline's name; default: the file's"},
            "description": {"type": "string", "description": "what it is for"},
            "extends": {
                "description": "a pipeline file, or several, that this one is a small difference from: mappings are "
                "merged, all else is replaced, null removes; a path is relative to the file that holds this key",
                "oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
            },
            "store": {
                "type": "string",
                "default": DEFAULT_STORE,
                "description": "where artifacts live: a folder, or an s3://, gs:// or az:// address; like every path "
                "but that of `extends` it is relative to the working folder, also in --set",
            },
            "tracking": {
                "type": ["string", "null"],
                "default": DEFAULT_TRACKING,
                "description": "MLflow: a sqlite:/// or http:// address; null: no tracking",
            },
            "tracking_required": {
                "type": "boolean",
                "default": False,
                "description": "true: a run does not start when MLflow is away; false: it says so and goes on",
            },
            "mirrors": {
                "type": ["object", "null"],
                "description": "where curves and results go beside MLflow; each needs the extra of its name installed",
                "properties": {
                    "tensorboard": {
                        "type": ["string", "null"],
                        "description": "a folder for event files, shown with `tensorboard --logdir FOLDER`",
                    },
                    "wandb": {
                        "type": ["string", "null"],
                        "description": "a Weights & Biases project; WANDB_MODE=offline keeps its runs on this machine",
                    },
                },
                "additionalProperties": False,
            },
            KEY: {
                "type": "object",
                "description": "variable -> its values: a stage with {variable} in its name is one for each value",
                "additionalProperties": {"type": "array", "items": {"type": ["string", "number"]}, "minItems": 1},
            },
            "stages": {
                "type": "object",
                "description": "the steps, by name",
                "propertyNames": {"pattern": f"^(({STAGE_NAME.pattern})|({VARIABLE.pattern}))+$"},
                # A repeated stage has variables in place of numbers: only `tessera plan` can check those.
                "patternProperties": {
                    VARIABLE.pattern: {
                        "type": ["object", "null"],
                        "properties": {"uses": {"enum": sorted(types)}},
                    }
                },
                "additionalProperties": {"oneOf": [stage, {"type": "null"}]},
            },
        },
        "additionalProperties": False,
        "anyOf": [{"required": ["stages"]}, {"required": ["extends"]}],
        "if": {"not": {"required": ["extends"]}},
        "then": {"properties": {"stages": {"additionalProperties": {"required": ["uses"]}}}},
        "$defs": defs,
    }


def _chosen_by(key: str, refs: Mapping[str, dict[str, Any]], required: bool) -> dict[str, Any]:
    """The schema of a mapping whose `key` says which of the schemas the rest of it follows."""
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {key: {"enum": sorted(refs)}},
        "allOf": [
            {"if": {"properties": {key: {"const": name}}, "required": [key]}, "then": refs[name]}
            for name in sorted(refs)
        ],
    }
    return schema | {"required": [key]} if required else schema


def _variant_bases(configs: Iterable[type[BaseModel]]) -> list[type[Settings]]:
    """Every settings class with named variants that a field can hold, at any depth, also within variants."""
    bases: dict[type[Settings], None] = {}
    todo, seen = list(configs), set()
    while todo:
        model = todo.pop()
        if model in seen:
            continue
        seen.add(model)
        for info in model.model_fields.values():
            for found in _settings_in(info.annotation):
                todo.append(found)
                if found.variant_group is not None and "variant_group" in vars(found):
                    bases[found] = None
                    todo += _loaded(found).values()
    return list(bases)


def _settings_in(annotation: Any) -> Iterator[type[Settings]]:
    for arm, _ in arms(annotation):
        if isinstance(arm, type) and issubclass(arm, Settings):
            yield arm
        for argument in getattr(arm, "__args__", ()):
            yield from _settings_in(argument)


def _loaded(base: type[Settings]) -> dict[str, type[Settings]]:
    group = base.variant_group or ""
    return {name: registry.load(group, name) for name in registry.names(group)}


def _key(reference: Mapping[str, Any]) -> str:
    return str(reference["$ref"]).rsplit("/", 1)[-1]
