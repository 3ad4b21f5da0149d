"""Weights as other projects publish them: whose release a file is, told by the names of its tensors; and timm's names.

Understood are timm's own names, also under the prefixes of training scripts; the releases of DINO, iBOT, DINOv2 (whole
or in chunks of blocks), DINOv3 and MoCo v1 to v3; and what timm itself converts for the model at hand (Swin, ...).
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

UNDERSTOOD = "timm's names, and the files of DINO, iBOT, DINOv2, DINOv3, MoCo v1 to v3 and of the model's own authors"

# Keys under which training scripts keep the network, in the order of preference: papers evaluate the teacher.
_WRAPPERS = ("teacher", "state_dict", "model", "student", "encoder")
_PREFIXES = (
    "module.",
    "teacher.",
    "backbone.",
    "model.",
    "encoder.",
    "student.",
    "base_encoder.",
    "momentum_encoder.",
    "encoder_q.",
    "encoder_k.",
)
# Of two networks in a file the later one is kept: the teacher of self-distillation, the trained encoder of MoCo.
_PREFERENCE = ("student.", "momentum_encoder.", "encoder_k.", "teacher.", "base_encoder.", "encoder_q.")
# DINOv2 trains the blocks of its ViTs in chunks: blocks.<chunk>.<block>.
_CHUNKED = re.compile(r"^blocks\.\d+\.(\d+)\.(?=norm1|attn|ls1|norm2|mlp|ls2)")
_TRUNK = re.compile(r"^(blocks\.|layer\d\.|patch_embed\.|conv1\.|bn1\.|reg_token|register_tokens)")


def network(content: Any) -> dict[str, Tensor]:
    """The tensors of one network by name, out of the mappings that a training script wrapped it in; may be empty."""
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        return {}
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


def strip_prefixes(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under keys without the prefixes of wrappers and chunks; of two networks, one is kept."""

    def rank(key: str) -> int:
        return max((i for i, part in enumerate(_PREFERENCE) if part in key), default=-1)

    ordered: dict[str, Tensor] = {}
    for key, value in sorted(weights.items(), key=lambda item: rank(item[0])):
        while prefix := next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None):
            key = key[len(prefix) :]
        ordered[key] = value
    if "patch_embed.proj.weight" not in ordered:
        return ordered
    return {_CHUNKED.sub(r"blocks.\1.", key): value for key, value in ordered.items()}


def release(weights: Collection[str]) -> str | None:
    """Which project's release the names in a file are of; None where they are timm's names or nobody's.

    The bare backbones of DINO and iBOT have timm's names.
    """
    bare = strip_prefixes(dict.fromkeys(weights, torch.empty(0)))
    if any("base_encoder." in key or "momentum_encoder." in key for key in weights):
        return "MoCo v3"
    if any("encoder_q." in key for key in weights):
        return "MoCo v1 or v2"
    if "storage_tokens" in bare:
        return "DINOv3"
    if "register_tokens" in bare:
        return "DINOv2 with registers"
    if "mask_token" in bare and any(key.endswith("ls1.gamma") for key in bare):
        return "DINOv2"
    if "masked_embed" in bare or any(key.startswith("head.last_layer2.") for key in bare):
        return "iBOT"
    return "DINO" if any(key.startswith("head.last_layer.") for key in bare) else None


def timm_names(weights: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The same weights under the names of a timm model, by timm's conversion where that fits more of them."""
    own = model.state_dict()
    if own.keys() <= weights.keys():
        return weights
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return weights
    given = dict(weights)
    if "register_tokens" in given:
        given.setdefault("mask_token", torch.empty(0))  # by which timm knows DINOv2
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a line for each bias that it leaves out
            converted = convert(given, model)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return weights  # it expects another file
    return converted if len(own.keys() & converted.keys()) > len(own.keys() & weights.keys()) else weights


def disagreement(of: str, weights: Mapping[str, Tensor], model: Any) -> str | None:
    """Why weights of a known release do not make the network that was trained, loaded into this model; None: they do.

    Args:
        of: what `release` said.
        weights: under timm's names.
        model: of timm.
    """
    own = model.state_dict()
    trunk = [key for key in {**own, **weights} if _TRUNK.match(key)]
    unlike = [key for key in trunk if key not in own or key not in weights or own[key].shape != weights[key].shape]
    if unlike:
        named = ", ".join(unlike[:4]) + (f", and {len(unlike) - 4} more" if len(unlike) > 4 else "")
        return f"holds {described(weights)} of {of}, and the model is {described(own)} (unlike are {named})"
    heads = getattr(getattr(_first_block(model), "attn", None), "num_heads", None)
    if of == "MoCo v3" and heads not in (None, 12) and weights["patch_embed.proj.weight"].shape[0] == 384:
        return (
            f"holds a ViT-S of MoCo v3, which has 12 attention heads where the model has {heads}: set backbone.kwargs "
            "to {num_heads: 12}"
        )
    return None


def described(weights: Mapping[str, Tensor]) -> str:
    """What kind of network these tensors are of, in words."""
    patches = weights.get("patch_embed.proj.weight")
    if patches is None or patches.ndim != 4:
        stages = sorted({key[: key.index(".")] for key in weights if re.match(r"layer\d\.", key)})
        return f"a ResNet of {len(weights)} tensors" if stages else f"a network of {len(weights)} tensors"
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    registers = weights.get("reg_token", weights.get("register_tokens"))
    more = [f"{registers.shape[1]} registers"] if registers is not None else []
    more += ["layer scale"] if any(key.endswith("ls1.gamma") for key in weights) else []
    shape = f"width {patches.shape[0]}, {depth} blocks, patches of {patches.shape[-1]} pixels"
    return f"a ViT of {', '.join([shape, *more])}"


def _first_block(model: Any) -> Any:
    blocks = getattr(model, "blocks", None)
    return blocks[0] if blocks is not None and len(blocks) else None
