"""Weights from another project's file into a timm model.

Wrappers and prefixes are removed, the position table is fitted to the model's grid, and mismatches are reported.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import SourceError
from pipeline.stage import local_path, open_source

# Keys under which training scripts keep the network, in the order of preference: papers evaluate the teacher.
_WRAPPERS = ("teacher", "state_dict", "model", "student", "encoder")
_PREFIXES = ("module.", "teacher.", "backbone.", "model.", "encoder.", "student.")


def load_checkpoint(model: nn.Module, address: str, *, say: Callable[[str], None]) -> None:
    """Loads the tensors that match by name and shape.

    Args:
        model: a timm model; changed in place.
        address: of the file: a path, or an address in a bucket.
        say: called with one line about what was loaded, and with one about each kind of tensor that did not match.

    Raises: SourceError if the file is missing, is not a file of weights, or if nothing in it matches.
    """
    weights = _fit(strip_prefixes(read_weights(address)), model)
    own = model.state_dict()
    matching = {key: value for key, value in weights.items() if key in own and own[key].shape == value.shape}
    if not any(value.ndim for value in matching.values()):
        raise SourceError(
            f"checkpoint {address}: none of its {len(weights)} tensors fits {type(model).__name__} "
            f"(it has {_some(weights)}; the model expects {_some(own)}): name the timm model it was trained with"
        )
    model.load_state_dict(matching, strict=False)
    shapes = [
        f"{key} {tuple(weights[key].shape)} for {tuple(own[key].shape)}"
        for key in weights
        if key in own and key not in matching
    ]
    unused = [key for key in weights if key not in own]
    missing = [key for key in own if key not in weights]
    say(f"checkpoint {address}: {len(matching)} of {len(own)} tensors loaded")
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
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file can raise almost anything; the user gets one kind of error
        raise SourceError(
            f"checkpoint {address}: not a readable file of weights ({_why_unreadable(error)}); "
            "save its state dict with safetensors or torch.save"
        ) from error
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    found = (
        {key: value for key, value in content.items() if isinstance(value, Tensor)}
        if isinstance(content, Mapping)
        else {}
    )
    if not found:
        raise SourceError(f"checkpoint {address}: holds no named tensors; save the network's state dict")
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


def strip_prefixes(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under keys without the prefixes of wrappers; of student and teacher, the teacher's are kept."""
    ordered: dict[str, Tensor] = {}
    for key, value in sorted(weights.items(), key=lambda item: "teacher." in item[0]):
        while prefix := next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None):
            key = key[len(prefix) :]
        ordered[key] = value
    return ordered


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
