"""What is told to MLflow, as records: plain JSON objects, one for each thing that a run or a stage says.

A record is complete in itself, with its own time, so that it can be sent at any later time, also twice, with the same
result. Runs are named by an id of our own (`run`), models by the fingerprint of their artifact.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from pipeline.config import registry
from pipeline.errors import StoreError

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact

Record: TypeAlias = dict[str, Any]

FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"
VALUE_LENGTH, KEY_LENGTH, DIGEST_LENGTH = 500, 250, 36  # MLflow's limits are 6000, 250 and 36


def run_begins(run: str, name: str, tags: Mapping[str, str], parent: str | None) -> Record:
    """A run is opened; with a parent, as a nested one."""
    return {"op": "run", "run": run, "name": name, "tags": dict(tags), "parent": parent, "at": now()}


def run_ends(run: str, status: str) -> Record:
    """A run is closed."""
    return {"op": "end", "run": run, "status": status, "at": now()}


def parameters(run: str, settings: Mapping[str, Any]) -> Record:
    """A stage's settings, as MLflow's parameters."""
    return {"op": "params", "run": run, "values": as_params(settings)}


def metrics(run: str, values: Mapping[str, float], step: int, of: Mapping[str, Any] | None = None) -> Record:
    """Values of one step.

    Args:
        run: whose.
        values: name -> value.
        step: of the training; 0 for results.
        of: what they measure: `model`, a fingerprint, and `dataset`, its name and digest.
    """
    named = {as_key(name): float(value) for name, value in values.items()}
    return {"op": "metrics", "run": run, "values": named, "step": step, "at": now(), **(of or {})}


def reads(run: str, datasets: Iterable[Record], models: Iterable[Record]) -> Record:
    """What a run reads (and the dataset it writes: MLflow has no outputs but models)."""
    return {"op": "inputs", "run": run, "datasets": list(datasets), "models": list(models)}


def makes(run: str, model: Record) -> Record:
    """The model that a run has made."""
    return {"op": "output", "run": run, "model": model}


def tag(run: str, key: str, value: str) -> Record:
    """One tag of a run."""
    return {"op": "tag", "run": run, "key": key, "value": value}


def upload(run: str, file: str) -> Record:
    """A file kept beside the records, to be uploaded."""
    return {"op": "upload", "run": run, "file": file}


def model_of(artifact: Artifact, name: str) -> Record:
    """An artifact as MLflow's logged model: it stays where it is, MLflow gets its settings and its address."""
    manifest = artifact.manifest
    return {
        "name": re.sub(r"[^\w.-]", "_", name),
        "fingerprint": artifact.fingerprint,
        "address": artifact.address,
        "type": artifact.kind,
        "params": as_params({"uses": manifest.uses, **manifest.config}),
    }


def dataset_of(artifact: Artifact, context: str) -> Record:
    """An artifact as MLflow's dataset."""
    profile = {"rows": artifact.rows, "files": len(artifact.manifest.files), "stage": artifact.manifest.stage}
    return dataset(artifact.kind, artifact.fingerprint, artifact.address, context, profile)


def dataset(name: str, digest: str, address: str, context: str, profile: Mapping[str, Any] | None = None) -> Record:
    """A dataset.

    Args:
        name: kind of artifact, or what a source is called.
        digest: fingerprint of the artifact, or of the source's content.
        address: where it lies.
        context: how the run uses it.
        profile: rows, files, and the like.
    """
    found = {"name": name, "digest": digest, "address": address, "context": context}
    return {**found, "profile": dict(profile or {})}


def is_model(artifact: Artifact) -> bool:
    """Whether an artifact is a model in MLflow's terms; not where its stage type is not installed here."""
    made_by = registry.stage_class(artifact.manifest.uses)
    return made_by is not None and made_by.tracked_as == "model"


def models_read(inputs: Mapping[str, Artifact]) -> list[Artifact]:
    """The models among what a stage reads; where there are none, those that its inputs were made with.

    So what is computed from an encoder's stored features is about the encoder.
    """
    models = [artifact for artifact in inputs.values() if is_model(artifact)]
    return models or [model for artifact in inputs.values() for model in _models_behind(artifact)]


def _models_behind(artifact: Artifact) -> list[Artifact]:
    found = []
    for name in artifact.manifest.inputs.values():
        kind, _, fingerprint = name.partition("/")
        with contextlib.suppress(StoreError):  # an artifact stays whole when what it was made from is deleted
            found.append(type(artifact).open(artifact.objects.address, kind, fingerprint))
    return [made_with for made_with in found if is_model(made_with)]


def measured(made: Artifact, inputs: Mapping[str, Artifact], models: Iterable[Artifact]) -> dict[str, Any]:
    """What a stage's results are about: the model that it makes or reads, and the first dataset that it reads, if any.

    Nothing where there is no such model or more than one: then it cannot be said whose results they are.

    Args:
        made: by the stage.
        inputs: dotted field path -> artifact.
        models: those of `models_read`.
    """
    models = [made] if is_model(made) else list(models)
    datasets = [artifact for artifact in inputs.values() if not is_model(artifact)]
    if len({artifact.fingerprint for artifact in models}) != 1:
        return {}
    on = {"dataset": [datasets[0].kind, datasets[0].fingerprint[:DIGEST_LENGTH]]} if datasets else {}
    return {"model": models[0].fingerprint, **on}


def may_be_tied(value: float) -> bool:
    """Whether MLflow can tie a value to a model: it would store NaN there as 0."""
    return math.isfinite(value)


def as_params(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as MLflow's parameters."""
    return {as_key(key): value[:VALUE_LENGTH] for key, value in flatten(settings).items()}


def as_key(name: str) -> str:
    """A name as MLflow takes it."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:KEY_LENGTH]


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted keys, as in `--set`; an empty list or mapping is a value."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{path}.")
        elif isinstance(value, list) and value and any(isinstance(item, Mapping) for item in value):
            flat |= flatten({str(i): item for i, item in enumerate(value)}, f"{path}.")
        else:
            flat[path] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def now() -> int:
    """Milliseconds since the epoch, as MLflow counts."""
    return int(time.time() * 1000)
