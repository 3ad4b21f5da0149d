"""Label maps: which values of a mask are which class, for masks whose values are sparse ids or finer than wanted.

Written as value -> class name (null: ignored) or as class name -> value or values, in the config or in a file of JSON
or YAML. The maps in `label_maps/` are known by their name. Planning imports this file: nothing heavy at its top.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import SourceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SHIPPED = Path(__file__).parent / "label_maps"
HIGHEST = 65535  # a mask has at most 16 bits
VOID = 65535  # stands for no class in masks that a format itself puts together


@dataclass(frozen=True)
class LabelMap:
    """The classes in order, and the class of each value."""

    names: tuple[str, ...]
    index_of: Mapping[int, int]  # value in the source's mask -> index into names
    ignored: frozenset[int] = field(default_factory=frozenset)  # values that count for nothing on purpose

    def apply(self, mask: NDArray[Any], ignore_index: int) -> tuple[NDArray[Any], list[int]]:
        """A mask as class indices, and the values in it that the map does not list: they get `ignore_index`.

        Args:
            mask: (H, W), the source's values.
            ignore_index: what counts for nothing in the result.
        """
        import numpy as np

        present = np.flatnonzero(np.bincount(mask.ravel(), minlength=1)).tolist()
        table: NDArray[np.uint16] = np.full(HIGHEST + 1, ignore_index, np.uint16)
        table[list(self.index_of)] = list(self.index_of.values())
        small = max(len(self.names), ignore_index) < 256
        unlisted = [value for value in present if value not in self.index_of and value not in self.ignored]
        return table.astype(np.uint8 if small else np.uint16)[mask], unlisted


def shipped() -> list[str]:
    """The names of the maps that come with Tessera."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def read(text: bytes | str, place: str) -> LabelMap:
    """The map in a file's text. Raises SourceError, which names the file as `place`."""
    import yaml

    try:
        return parse(yaml.safe_load(text))
    except (yaml.YAMLError, ValueError, UnicodeDecodeError) as error:
        reason = str(error).split("\n")[0]
        raise SourceError(f"label map {place} is not usable: {reason}") from None


def parse(written: Any) -> LabelMap:
    """The map that a user wrote, in either form. Raises ValueError for anything else."""
    if not isinstance(written, Mapping) or not written:
        raise ValueError("a label map is a mapping: `7: road` for each value, or `road: [7, 9]` for each class")
    if all(_is_number(key) for key in written):
        return _by_value({int(key): name for key, name in written.items()})
    if any(_is_number(key) and isinstance(value, str) for key, value in written.items()):
        raise ValueError("a label map goes either from values to classes or from classes to values, not both ways")
    return _by_class({str(name): values for name, values in written.items()})


def _by_value(written: Mapping[int, Any]) -> LabelMap:
    for value, name in written.items():
        if not (name is None or isinstance(name, str)):
            raise ValueError(f"value {value} of the label map needs the name of a class, or null, not {name!r}")
    names = tuple(dict.fromkeys(name for name in written.values() if name is not None))
    index_of = {value: names.index(name) for value, name in written.items() if name is not None}
    return _checked(names, index_of, frozenset(value for value, name in written.items() if name is None))


def _by_class(written: Mapping[str, Any]) -> LabelMap:
    names = tuple(written)
    index_of: dict[int, int] = {}
    for index, (name, values) in enumerate(written.items()):
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"class {name!r} of the label map needs a value or a list of them, not {values!r}")
            if value in index_of:
                raise ValueError(f"value {value} of the label map has two classes, {names[index_of[value]]} and {name}")
            index_of[value] = index
    return _checked(names, index_of, frozenset())


def _checked(names: tuple[str, ...], index_of: dict[int, int], ignored: frozenset[int]) -> LabelMap:
    if not names:
        raise ValueError("the label map names no class: every value in it is ignored")
    if wrong := [value for value in [*index_of, *ignored] if not 0 <= value <= HIGHEST]:
        raise ValueError(f"value {wrong[0]} of the label map is not one that a mask can hold (0 to {HIGHEST})")
    return LabelMap(names, index_of, ignored)


def _is_number(key: Any) -> bool:
    return (isinstance(key, int) and not isinstance(key, bool)) or (isinstance(key, str) and key.isdecimal())
