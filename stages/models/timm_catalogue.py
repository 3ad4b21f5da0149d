"""What timm's models are called, which are ViTs and what maps they give, read from timm's files as text.

Planning asks here: importing timm would import torch, which takes longer than the whole plan. What the text does not
say is in `timm_families.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from stages.models import timm_families

_REGISTERED = re.compile(r"^@register_model\s*\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)
_RENAMED = re.compile(r"^register_model_deprecations\(__name__, \{(.*?)^\}\)", re.MULTILINE | re.DOTALL)
_PAIR = re.compile(r"""['"](\w+)['"]\s*:\s*['"](\w+)""")
_PLAIN_VITS = ("vision_transformer", "deit")


@dataclass(frozen=True)
class TimmModel:
    """What timm's files say about a model."""

    name: str  # without the tag of its weights
    module: str  # the file of timm/models that makes it
    is_vit: bool | None  # whether it is a plain ViT; None where the file leaves it open
    patch: int | None  # side of a ViT's patch in pixels

    @property
    def is_resnet(self) -> bool:
        """Whether it is a ResNet, by the class that timm makes it of."""
        return self.module in ("resnet", "res2net", "resnest", "sknet")

    @property
    def strides(self) -> tuple[int, ...] | None:
        """Pixels that a cell stands for, of each level of the model from the finest; None where it is not known."""
        if self.patch is not None:
            return (self.patch,)
        if self.module in timm_families.COLUMNS:
            return (_patch(self.name, self.module),)
        return timm_families.pyramid(self.name, self.module)

    @property
    def has_single_map(self) -> bool:
        """False for a model whose features are several streams."""
        return timm_families.NO_SINGLE_MAP.match(self.name) is None

    @property
    def dilates(self) -> bool | None:
        """Whether its last stages can be dilated instead of strided; None where it is not known."""
        return self.module in timm_families.DILATED if self.strides is not None else None

    @property
    def divisor(self) -> int | None:
        """What sides of its images must be multiples of, unless a ViT's patch is changed; None: not known."""
        return self.strides[0] if self.strides and self.module in timm_families.WHOLE_PATCHES else None

    @property
    def pads(self) -> bool:
        """False for a model that takes no images smaller than a cell of its last level."""
        return self.module not in timm_families.UNPADDED

    @property
    def window_side(self) -> int | None:
        """What sides of its images must be multiples of for its windows, unless `img_size` says another; or None."""
        return timm_families.window_side(self.name, self.module)

    @property
    def own_size(self) -> int | None:
        """The side of the only images that it takes, unless `img_size` says another; None: it takes others."""
        return timm_families.own_size(self.name, self.module)


def look_up(name: str) -> TimmModel | None:
    """The model that timm has under a name, with or without the tag of its weights; None where it has none."""
    architecture = name.split(".")[0]
    architecture = _renamed().get(architecture, architecture)
    module = _modules().get(architecture)
    if module is None:
        return None
    if module in _PLAIN_VITS:
        return TimmModel(architecture, module, True, _patch(architecture, module))
    known = module in timm_families.COLUMNS or timm_families.pyramid(architecture, module) is not None
    return TimmModel(architecture, module, None if not known and "VisionTransformer" in _text(module) else False, None)


def names() -> list[str]:
    """All names, without tags, sorted; empty where timm's files cannot be read."""
    return sorted({**_modules(), **_renamed()})


def tags(name: str) -> list[str]:
    """The tags of weights that may follow a model's name after a dot; empty where its file does not list them."""
    model = look_up(name)
    if model is None:
        return []
    written = rf"""['"]{model.name}\.([\w.\-]+)\*?['"]\s*:"""
    return sorted(set(re.findall(written, _text(model.module))))


def _patch(architecture: str, module: str) -> int:
    body = re.search(rf"^def {architecture}\(.*?^    return ", _text(module), re.MULTILINE | re.DOTALL)
    side = re.search(r"\bpatch_size=(\d+)", body[0]) if body else None
    return int(side[1]) if side else 16  # timm's default


@cache
def _modules() -> dict[str, str]:
    """The file that makes each model."""
    files = sorted(_folder().glob("*.py")) if _folder().is_dir() else []
    return {name: file.stem for file in files for name in _REGISTERED.findall(_text(file.stem))}


@cache
def _renamed() -> dict[str, str]:
    """Former names that timm still accepts -> the present ones."""
    tables = [table for module in set(_modules().values()) for table in _RENAMED.findall(_text(module))]
    return {former: present for table in tables for former, present in _PAIR.findall(table)}


@cache
def _text(module: str) -> str:
    return (_folder() / f"{module}.py").read_text(encoding="utf-8")


@cache
def _folder() -> Path:
    spec = find_spec("timm")
    return Path(spec.origin or "").parent / "models" if spec is not None else Path("timm-is-not-installed")
