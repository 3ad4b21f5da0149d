"""One candidate becomes a row of the `images` table, or a reason why it cannot."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.data.images import ImageError, conversions, decode, decode_mask, encode_mask, probe
from stages.ingest.layout import Item, Layout, Raw, SourceObject, Vocabulary

OUTSIDE = "outside"  # the word by which a reason tells that a mask's values are no classes


@dataclass
class Checked:
    """What is known of one candidate after it was read."""

    row: dict[str, Any] | None = None  # of the `images` table, without its id; None: the candidate cannot be used
    problems: list[dict[str, str]] = field(default_factory=list)
    values: list[int] = field(default_factory=list)  # the class indices in its mask
    unlisted: list[int] = field(default_factory=list)  # values of the source's mask that the label map does not list
    converted: list[str] = field(default_factory=list)  # what decoding loses of the image, in words


def check_all(layout: Layout, vocabulary: Vocabulary, items: Sequence[Item], threads: int) -> list[Checked]:
    """Reads, decodes and checks candidates in threads: the decoders release Python's lock.

    Args:
        layout: reads the candidates.
        vocabulary: the classes that labels, masks and objects refer to.
        items: the candidates of one shard.
        threads: how many to use.

    Returns: what is known of each candidate, in their order.
    """
    read = layout.reader(items)
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        return list(pool.map(lambda item: check(layout, vocabulary, item, read), items))


def check(layout: Layout, vocabulary: Vocabulary, item: Item, read: Callable[[Item], Raw]) -> Checked:
    """One candidate, read and checked. Only decoding all of it proves that an image is readable; its bytes are kept.

    Args:
        layout: knows the format.
        vocabulary: the classes that label, mask and objects refer to.
        item: the candidate.
        read: what `layout.reader` gave for it.
    """
    checked = Checked()
    try:
        raw = read(item)
        height, width = decode(raw.image, max_pixels=layout.config.max_pixels).shape[:2]
        found, left_out = layout.objects(item, raw, (width, height))
        mask = layout.mask(item, raw, vocabulary, (width, height))
        if mask is not None and vocabulary.label_map is not None:
            mask, checked.unlisted = vocabulary.label_map.apply(mask, vocabulary.ignore_index)
        if mask is not None:
            checked.values = _check_mask(mask, vocabulary, (width, height))
        label, label_id = _label(layout, vocabulary, item, found)
        checked.converted = conversions(raw.image)
    except ImageError as error:
        checked.problems.append({"key": item.key, "reason": str(error)})
        return checked
    checked.problems += [{"key": item.key, "reason": f"object left out: {reason}"} for reason in left_out]
    checked.row = {
        "key": item.key,
        "image": raw.image,
        "width": width,
        "height": height,
        "sha256": hashlib.sha256(raw.image).hexdigest(),
        "split": item.split,
        "label": label,
        "label_id": label_id,
        "mask": None if mask is None else _mask_bytes(raw.mask, mask, layout.config.max_pixels),
        "objects": [_object(entry, vocabulary) for entry in found] if layout.has_objects else None,
        "sequence": item.sequence,
        "frame": item.frame,
    }
    return checked


def _check_mask(mask: NDArray[Any], vocabulary: Vocabulary, size: tuple[int, int]) -> list[int]:
    """The class indices in a mask. Raises ImageError for a mask of another size or with values that are no class."""
    height, width = mask.shape
    if (width, height) != size:
        raise ImageError(f"its mask has {width}x{height} pixels, the image has {size[0]}x{size[1]}")
    values = np.flatnonzero(np.bincount(mask.ravel(), minlength=1))
    values = values[values != vocabulary.ignore_index]
    if vocabulary.mask_classes is not None and len(values) and values[-1] >= len(vocabulary.mask_classes):
        wrong = ", ".join(str(value) for value in values[values >= len(vocabulary.mask_classes)][:5])
        raise ImageError(
            f"its mask has the value {wrong}, {OUTSIDE} the {len(vocabulary.mask_classes)} classes "
            f"and not the ignore_index {vocabulary.ignore_index}"
        )
    found: list[int] = values.tolist()
    return found


def _mask_bytes(found: bytes | None, mask: NDArray[Any], max_pixels: int) -> bytes:
    """A grey PNG of these indices, as an artifact holds them: the file as found if it is that, else a new one."""
    if found is not None:
        header = probe(found, max_pixels=max_pixels)
        grey = header.format == "PNG" and header.mode in ("L", "I;16")
        if grey and np.array_equal(decode_mask(found, max_pixels=max_pixels), mask):
            return found
    return encode_mask(mask)


def _label(
    layout: Layout, vocabulary: Vocabulary, item: Item, objects: Sequence[SourceObject]
) -> tuple[str | None, int | None]:
    """Name and class index of an image's label. Raises ImageError for a label that is not among the classes."""
    how = layout.config.label
    label = item.label if how == "source" else None
    if how == "largest_object":
        largest = max((entry for entry in objects if not entry.crowd), key=lambda entry: entry.area, default=None)
        label = largest.category if largest else None
    if label is None:
        return None, None
    if label not in vocabulary.classes:
        raise ImageError(f"its label {label!r} is not among the classes")
    return label, vocabulary.classes.index(label)


def _object(entry: SourceObject, vocabulary: Vocabulary) -> dict[str, Any]:
    return {
        "box": list(entry.box),
        "category": entry.category,
        "category_id": vocabulary.classes.index(entry.category),
        "crowd": entry.crowd,
        "mask": entry.mask,
    }
