"""The masks of a COCO source: polygons that are drawn, a panoptic json's PNGs of segment ids, PNGs of class indices.

A panoptic mask becomes COCO's category ids first; the label map, the config's or one made of the json's own categories,
makes classes of these.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SourceError
from stages.data.images import ImageError, decode_ids
from stages.ingest.label_map import VOID, LabelMap


class Segment(NamedTuple):
    """One region of a panoptic mask."""

    id: int
    category: int
    crowd: bool


# ------------------------------------------------------------------------------------------------- which mask is whose
def mask_path(names: Sequence[str], folders: Iterable[str], files: Collection[str]) -> str | None:
    """The first of these names in the first of these folders that has one; None where none has.

    Args:
        names: of mask files.
        folders: each with a slash at its end, or empty.
        files: what the source of the masks holds.
    """
    return next((f"{folder}{name}" for folder in folders for name in names if f"{folder}{name}" in files), None)


def without_polygons(annotations: Mapping[str, Sequence[Any]], source: str) -> list[dict[str, str]]:
    """A problem for each image that has objects without a polygon: they are not in its mask.

    Args:
        annotations: key of an image -> its objects.
        source: what the error calls it.

    Raises: SourceError when no object of any image has one.
    """
    total = sum(len(entries) for entries in annotations.values())
    lacking = {key: [e for e in entries if e.segmentation is None] for key, entries in annotations.items()}
    missing = sum(map(len, lacking.values()))
    if missing == total:
        raise SourceError(
            f"source {source}: masks_from: polygons, but none of the {total} objects in its json has a polygon: every "
            "mask would be all background (leave masks_from out for boxes alone; masks_from: panoptic or folder reads "
            "masks that are PNG files)"
        )
    return [
        {"key": key, "reason": f"not in its mask, for want of a polygon: {_some([entry.name for entry in entries])}"}
        for key, entries in sorted(lacking.items())
        if entries
    ]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# ------------------------------------------------------------------------------------------------------------ panoptic
def as_instances(content: dict[str, Any], address: str) -> dict[Any, tuple[str, tuple[Segment, ...]]]:
    """Takes a panoptic json apart: leaves its things as objects in `content`, as an instances json has them.

    Args:
        content: the json.
        address: where it is from.

    Returns:
        image id -> (name of its PNG, its segments).

    Raises: SourceError for a json that is not panoptic.
    """
    things = {c["id"] for c in content["categories"] if c.get("isthing", 1)}
    found: dict[Any, tuple[str, tuple[Segment, ...]]] = {}
    objects: list[dict[str, Any]] = []
    try:
        for entry in content["annotations"]:
            segments = []
            for each in entry["segments_info"]:
                segments.append(Segment(int(each["id"]), int(each["category_id"]), bool(each.get("iscrowd"))))
                if each["category_id"] in things and each.get("bbox"):
                    objects.append({**each, "image_id": entry["image_id"]})
            found[entry["image_id"]] = (str(entry["file_name"]), tuple(segments))
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(
            f"{address} is not a panoptic json: {error!r} (each of its annotations needs image_id, file_name and "
            "segments_info; for an instances json set masks_from: polygons)"
        ) from None
    content["annotations"] = objects
    return found


def category_map(categories: Mapping[int, tuple[str, str]], *, coarse: bool) -> LabelMap:
    """The label map of a panoptic json's own categories: their names, or with `coarse` their supercategories'.

    Args:
        categories: id -> (name, supercategory).
        coarse: whether the supercategories are the classes.
    """
    name_of = {number: categories[number][int(coarse)] for number in sorted(categories)}
    names = tuple(dict.fromkeys(name_of.values()))
    return LabelMap(names, {number: names.index(name) for number, name in name_of.items()})


def category_ids(png: bytes, segments: Sequence[Segment], *, crowd_counts: bool, max_pixels: int) -> NDArray[np.uint16]:
    """A panoptic mask as category ids, (H, W); `VOID` where no segment is, or a crowd that does not count.

    Args:
        png: the mask's file.
        segments: the json's.
        crowd_counts: whether crowd segments are of their category.
        max_pixels: larger masks are refused.

    Raises: ImageError for another kind of file, or for segment ids that the json does not have.
    """
    ids = decode_ids(png, max_pixels=max_pixels)
    present, place = np.unique(ids, return_inverse=True)
    category = {s.id: VOID if s.crowd and not crowd_counts else s.category for s in segments} | {0: VOID}
    if unknown := [value for value in present.tolist() if value not in category]:
        raise ImageError(f"its panoptic mask has segment ids that the json lacks: {_some(list(map(str, unknown)))}")
    table = np.array([category[value] for value in present.tolist()], np.uint16)
    made: NDArray[np.uint16] = table[place.reshape(ids.shape)]
    return made


def check_shape(shape: Any, width: int, height: int) -> None:
    """Raises ValueError for a shape that pycocotools, written in C, would misread or read beyond its end."""
    if isinstance(shape, list):
        for polygon in shape:
            if len(polygon) < 6 or len(polygon) % 2 or not all(isinstance(v, int | float) for v in polygon):
                raise ValueError("a polygon needs three points, as a flat list of numbers")
            if not all(-1e5 < v < 1e5 for v in polygon):
                raise ValueError("a polygon lies far outside the image")
        return
    if not isinstance(shape, dict) or list(shape.get("size", ())) != [height, width]:
        raise ValueError(f"its RLE is not of the image's size, [height, width] = [{height}, {width}]")
    counts = shape.get("counts")
    runs = decompress(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or any(not isinstance(n, int) or n < 0 for n in runs) or sum(runs) != width * height:
        raise ValueError("its RLE runs do not add up to the image")


def decompress(text: str) -> list[int]:
    """The run lengths in COCO's compressed string.

    A number is written in groups of 5 bits, one a character, the lowest first; from the fourth on, a number is the
    difference to the run two before it.
    """
    runs: list[int] = []
    at = 0
    while at < len(text):
        value = shift = 0
        while True:
            if at >= len(text) or not 48 <= ord(text[at]) < 112:
                raise ValueError("its compressed RLE is broken")
            bits = ord(text[at]) - 48
            at += 1
            value |= (bits & 0x1F) << shift
            shift += 5
            if not bits & 0x20:
                break
        if bits & 0x10:  # the sign
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return runs
