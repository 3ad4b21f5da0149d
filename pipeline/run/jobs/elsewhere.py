"""A pipeline as another machine can run it: one file, every address absolute, no secret in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.load import Pipeline, load_pipeline
from pipeline.errors import ConfigError, UsageError
from pipeline.paths import local_path
from pipeline.run.tracking import absolute_uri, masked
from pipeline.store.address import mask


def absolute(address: str) -> str:
    """A path of this machine made absolute; an address with a scheme as it is."""
    return address if "://" in address else str(local_path(address).absolute())


def pipeline_text(pipeline: Pipeline) -> str:
    """The pipeline as one YAML file without `extends`; what `--set` changed is part of it.

    Raises:
        ConfigError: an address holds a password or key: what is sent can be read on the cluster.
    """
    secrets = []
    addresses = {"store": (pipeline.store, mask(pipeline.store))}
    if pipeline.tracking:
        addresses["tracking"] = (pipeline.tracking, masked(pipeline.tracking))
    stages: dict[str, Any] = {}
    for name, stage in pipeline.stages.items():
        settings = stage.stage.config.model_dump(mode="json", by_alias=True, exclude_unset=True)
        for path, source in stage.sources.items():
            addresses[f"stages.{name}.{path}"] = (source, mask(source))
            _put(settings, path.split("."), absolute(source))
        stages[name] = {"uses": stage.uses, **settings}
    for path, (address, shown) in addresses.items():
        if address != shown:
            secrets.append(
                pipeline.problem(
                    path,
                    f"{shown} holds a secret, which a job would carry in clear",
                    "see --env, or set it on the nodes",
                )
            )
    if secrets:
        raise ConfigError(secrets)
    whole = {
        "name": pipeline.name,
        "description": pipeline.description or None,
        "store": absolute(pipeline.store),
        "tracking": absolute_uri(pipeline.tracking) if pipeline.tracking else None,
        "tracking_required": pipeline.tracking_required or None,
        "mirrors": {
            name: absolute(where) if name == "tensorboard" else where for name, where in pipeline.mirrors.items()
        }
        or None,
        "stages": stages,
    }
    return yaml.safe_dump({k: v for k, v in whole.items() if v is not None or k == "tracking"}, sort_keys=False)


def local_paths(pipeline: Pipeline) -> dict[str, str]:
    """What the pipeline reads or writes on a disk: dotted path -> absolute path."""
    found = {"store": pipeline.store}
    if pipeline.tracking and pipeline.tracking.startswith("sqlite:///"):
        found["tracking"] = pipeline.tracking.removeprefix("sqlite:///")
    for name, stage in pipeline.stages.items():
        found |= {f"stages.{name}.{path}": source for path, source in stage.sources.items()}
    return {path: absolute(address) for path, address in found.items() if "://" not in address}


def check_same(text: str, file: Path, pipeline: Pipeline) -> None:
    """Raise UsageError unless the text, written to `file`, means the same pipeline."""
    file.write_text(text, encoding="utf-8")
    again = load_pipeline(file)
    for name, stage in pipeline.stages.items():
        one, other = stage.stage.config.model_dump(mode="json"), again.stages[name].stage.config.model_dump(mode="json")
        for path, source in stage.sources.items():
            _put(one, path.split("."), absolute(source))
        if one != other:
            raise UsageError(f"stages.{name} cannot be written as one file: report this with the pipeline")


def _put(settings: Any, keys: Sequence[str], value: str) -> None:
    for key in keys[:-1]:
        settings = settings[int(key)] if isinstance(settings, list) else settings.setdefault(key, {})
    if isinstance(settings, list):
        settings[int(keys[-1])] = value
    else:
        settings[keys[-1]] = value
