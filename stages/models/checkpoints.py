"""Weights from another project's file into a timm model.

The file is read without executing anything in it, `published.py` gives its tensors timm's names, the position table is
fitted to the model's grid, and mismatches are reported.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import SourceError
from pipeline.stage import local_path, open_source
from stages.models import published


def load_checkpoint(model: nn.Module, address: str, *, say: Callable[[str], None]) -> None:
    """Loads the tensors that match by name and shape.

    Args:
        model: a timm model; changed in place.
        address: of the file: a path, or an address in a bucket.
        say: called with one line about what was loaded, and with one about each kind of tensor that did not match.

    Raises: SourceError if the file is missing, is not a file of weights, if nothing in it matches, or if it is of a
        known release whose network is not the model's.
    """
    found = read_weights(address)
    of = published.release(found)
    weights = _fit(published.timm_names(published.strip_prefixes(found), model), model)
    own = model.state_dict()
    matching = {key: value for key, value in weights.items() if key in own and own[key].shape == value.shape}
    if not any(value.ndim for value in matching.values()):
        raise SourceError(
            f"checkpoint {address}: none of its {len(weights)} tensors fits {type(model).__name__} "
            f"(it has {_some(weights)}; the model expects {_some(own)}): name the timm model it was trained with; "
            f"understood are {published.UNDERSTOOD}"
        )
    if of is not None and (why := published.disagreement(of, weights, model)) is not None:
        raise SourceError(f"checkpoint {address}: {why}; name the timm model it was trained with")
    model.load_state_dict(matching, strict=False)
    shapes = [
        f"{key} {tuple(weights[key].shape)} for {tuple(own[key].shape)}"
        for key in weights
        if key in own and key not in matching
    ]
    unused = [key for key in weights if key not in own]
    missing = [key for key in own if key not in weights]
    kind = f" of {of}" if of is not None else ""
    say(f"checkpoint {address}: {len(matching)} of {len(own)} tensors{kind} loaded")
    for what, keys in (
        ("of another shape", shapes),
        ("not in the model", unused),
        ("not in the file, left random", missing),
    ):
        if keys:
            say(f"checkpoint {address}: {len(keys)} {what}: {_some(keys, 12)}")


def read_weights(address: str) -> dict[str, Tensor]:
    """All tensors by name, from a .safetensors or a torch file, which is read without executing anything in it.

    Raises: SourceError if the file is missing or is not a file of weights.
    """
    data = _read(address)
    try:
        if address.endswith(".safetensors"):
            from safetensors.torch import load

            return load(data)
        # Training scripts keep their arguments in this class, which holds values and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file can raise almost anything; the user gets one kind of error
        raise SourceError(
            f"checkpoint {address}: not a readable file of weights ({_why_unreadable(error)}); "
            "save its state dict with safetensors or torch.save"
        ) from error
    found = published.network(content)
    if not found:
        holds = f"; at its top are {_some(content)}" if isinstance(content, dict) and content else ""
        raise SourceError(
            f"checkpoint {address}: holds no named tensors{holds}; save the network's state dict (understood are "
            f"{published.UNDERSTOOD})"
        )
    return found


def _why_unreadable(error: Exception) -> str:
    if isinstance(error, UnpicklingError):
        return "beside tensors it holds Python objects, which may run any code when they are read"
    if isinstance(error, EOFError) or "zip archive" in str(error) or "deserializing header" in str(error):
        return "it is cut off or damaged"
    return f"{type(error).__name__}: {_first_line(error)}"


def _read(address: str) -> bytes:
    """The bytes of a local path, or of a file in a bucket (`s3://bucket/file.pth`). Raises: SourceError, StoreError."""
    if "://" in address:
        folder, _, name = address.rpartition("/")
        data = open_source(folder).get(name)
    else:
        path = local_path(address)
        data = path.read_bytes() if path.is_file() else None
    if data is None:
        raise SourceError(f"checkpoint {address}: there is no such file; correct backbone.checkpoint")
    return data


def _fit(weights: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The same weights, with the position table resampled to the model's grid and its number of prefix tokens."""
    table = getattr(model, "pos_embed", None)
    found = weights.get("pos_embed")
    if not isinstance(table, Tensor) or found is None or found.ndim != 3 or found.shape == table.shape:
        return weights
    from timm.layers import resample_abs_pos_embed

    wanted = 0 if getattr(model, "no_embed_class", False) else int(getattr(model, "num_prefix_tokens", 0))
    cells = found.shape[1]
    prefix = next((n for n in (wanted, 1, 0) if round((cells - n) ** 0.5) ** 2 == cells - n), None)
    if prefix is None or prefix < wanted:
        return weights
    side = round((cells - prefix) ** 0.5)
    grid = tuple(model.patch_embed.grid_size)
    resized = resample_abs_pos_embed(found[:, prefix - wanted :], grid, (side, side), num_prefix_tokens=wanted)
    return {**weights, "pos_embed": resized}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _some(keys: Any, limit: int = 4) -> str:
    names = list(keys)
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")
