"""Whether the weights that backbones ask for can be had on this machine, before a run has started anything.

Planning may import this file; torch and timm are imported only for a backbone that asks for weights.
"""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import urlsplit

from pydantic import BaseModel

from pipeline.errors import TesseraError
from stages.models.settings import Backbone

ANSWER_SECONDS = 5.0


def obstacles(settings: BaseModel, say: Callable[[str], None]) -> Iterator[tuple[str, str, str]]:
    """What is wrong with the weights of every backbone in these settings, as `Stage.obstacles` yields it.

    Args:
        settings: a stage's config.
        say: gets a line about each kind of tensor of a checkpoint that did not match.
    """
    for path, backbone in backbones(settings):
        if backbone.checkpoint is not None:
            if what := _unusable(backbone, say):
                yield f"{path}.checkpoint".lstrip("."), what, ""
        elif backbone.pretrained and (found := _unreachable(backbone.name)):
            yield f"{path}.pretrained".lstrip("."), *found


def backbones(value: object, path: str = "") -> Iterator[tuple[str, Backbone]]:
    """Every backbone in a settings object, at any depth, with its dotted path."""
    if isinstance(value, Backbone):
        yield path, value
    elif isinstance(value, BaseModel):
        for name, info in type(value).model_fields.items():
            yield from backbones(getattr(value, name), f"{path}.{info.alias or name}".lstrip("."))
    elif isinstance(value, Mapping | list | tuple):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from backbones(item, f"{path}.{key}")


def _unusable(backbone: Backbone, say: Callable[[str], None]) -> str | None:
    from stages.models.encoder import Encoder

    try:
        Encoder.build(backbone, say=say)
    except TesseraError as error:
        return str(error).removeprefix("checkpoint ")
    return None


def _unreachable(name: str) -> tuple[str, str] | None:
    """What is wrong and what to do, where timm's weights for a name are not here and cannot be downloaded."""
    import timm
    from huggingface_hub import constants, try_to_load_from_cache

    facts = timm.get_pretrained_cfg(name)
    if facts is None or not facts.has_weights:
        return f"timm has no weights for {name}", "remove pretrained, or name a file with checkpoint:"
    repo = facts.hf_hub_id
    if not repo:
        return None  # from another server: timm will say
    files = ("model.safetensors", "pytorch_model.bin")
    if any(isinstance(try_to_load_from_cache(repo, file), str) for file in files):
        return None
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if not constants.HF_HUB_OFFLINE and _answers(endpoint):
        return None
    host = urlsplit(endpoint).hostname
    why = "HF_HUB_OFFLINE forbids a download" if constants.HF_HUB_OFFLINE else f"{host} does not answer"
    return (
        f"the weights of {name} are not in {constants.HF_HUB_CACHE}, and {why}",
        f"download {files[0]} of {host}/{repo} elsewhere, put it on this machine, and name its path with checkpoint: "
        "in place of pretrained: true",
    )


def _answers(endpoint: str) -> bool:
    """Whether a server answers, whatever it says; a proxy of the environment is used."""
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
