"""Layout `coco`: images and COCO json files with boxes, polygons and crowd regions (RLE, compressed or not).

Segmentations are kept per object as the json has them; `masks_from: polygons` also draws them into one mask of class
indices per image, so that a segmentation protocol can run on a detection set.
"""

from __future__ import annotations

import json
import math
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SourceError
from stages.data.images import ImageError
from stages.ingest.files import read_file
from stages.ingest.layout import SPLITS, Item, Layout, Listing, Raw, SourceObject, Vocabulary

BACKGROUND = "background"
_INSTANCES = re.compile(r"(?:annotations/)?instances_(\w+)\.json")  # instances_train2017.json


class _Annotation(NamedTuple):
    """One object as the json has it, small enough to hold a million of."""

    name: str
    category: str
    supercategory: str
    box: tuple[float, float, float, float]  # x, y, width, height
    area: float
    crowd: bool
    segmentation: bytes | None  # json


class Coco(Layout):
    """Images of split S lie in `S/` or `images/S/`, or in `images/` or the source itself where there is no such folder.

    Without `annotations`, the source's own are taken: `instances_S.json`, in it or in its folder `annotations`.
    """

    has_objects: ClassVar[bool] = True

    def candidates(self) -> Listing:
        """The images that the jsons list, with their annotations."""
        items: dict[str, Item] = {}
        problems: list[dict[str, str]] = []
        categories: dict[int, tuple[str, str]] = {}
        for split, name_there, address in self._annotation_files():
            content = _load(address)
            categories |= {c["id"]: (c["name"], c.get("supercategory", c["name"])) for c in content["categories"]}
            annotations, orphans = _by_image(content, categories, address)
            problems += orphans
            folder = self._folder(name_there)
            for image in content["images"]:
                name = str(image["file_name"])
                key = posixpath.normpath(f"{folder}{name}")
                place = f"named in {posixpath.basename(address)}"
                if key not in self.files.sizes:  # a path out of the source is no key either
                    problems.append({"key": key, "reason": f"{place}, but there is no such file in the source"})
                elif key in items:
                    problems.append({"key": key, "reason": f"{place} twice: the first entry counts"})
                else:
                    stated = (image.get("width"), image.get("height"))
                    detail = (stated, tuple(annotations.pop(image["id"], ())))
                    items[key] = Item(key, split, self.files.sizes[key], key, annotation=detail)
        ordered = sorted(categories)
        names = tuple(self.config.classes or [categories[number][0] for number in ordered])
        vocabulary = Vocabulary(names, self._mask_classes([categories[number] for number in ordered]), self._ignore())
        notes = {"category_ids": ordered, "supercategories": [categories[number][1] for number in ordered]}
        return Listing(sorted(items.values(), key=lambda item: item.key), vocabulary, problems, notes)

    def objects(self, item: Item, raw: Raw, size: tuple[int, int]) -> tuple[Sequence[SourceObject], Sequence[str]]:
        """Boxes clipped to the image; an object whose box or segmentation cannot be used is left out."""
        width, height = size
        stated, annotations = item.annotation
        if stated != (None, None) and stated != size:
            raise ImageError(f"the json says {stated[0]}x{stated[1]} pixels, the image has {width}x{height}")
        found, left_out = [], []
        for entry in annotations:
            x, y, w, h = entry.box
            box = (max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height)))
            if not all(math.isfinite(value) for value in box) or box[2] <= box[0] or box[3] <= box[1]:
                left_out.append(f"{entry.name}: its box {list(entry.box)} covers nothing of the image")
            elif self.config.classes and entry.category not in self.config.classes:
                left_out.append(f"{entry.name}: category {entry.category} is not among the classes")
            else:
                try:
                    if entry.segmentation is not None:
                        _check(json.loads(entry.segmentation), width, height)
                except ValueError as error:
                    left_out.append(f"{entry.name}: {error}")
                else:
                    found.append(SourceObject(box, entry.category, entry.crowd, entry.segmentation, entry.area))
        return found, left_out

    def mask(self, item: Item, raw: Raw, vocabulary: Vocabulary, size: tuple[int, int]) -> NDArray[Any] | None:
        """Large objects first, so that a cup on a table stays a cup; crowd regions below all of them."""
        if self.config.masks_from != "polygons" or vocabulary.mask_classes is None:
            return None
        width, height = size
        top = max(len(vocabulary.mask_classes), vocabulary.ignore_index)
        drawn = np.zeros((height, width), np.uint8 if top < 256 else np.uint16)
        found, _ = self.objects(item, raw, size)
        level = {entry.category: entry.supercategory for entry in item.annotation[1]}
        for entry in sorted(found, key=lambda entry: (not entry.crowd, -entry.area)):
            name = level[entry.category] if self.config.mask_level == "supercategory" else entry.category
            value = vocabulary.mask_classes.index(name)
            if entry.crowd and self.config.crowd == "ignore":
                value = vocabulary.ignore_index
            if entry.mask is not None:
                drawn[rasterise(entry.mask, width, height)] = value
        return drawn

    def _annotation_files(self) -> list[tuple[str, str, str]]:
        """(split, what the source calls it, address of its json), sorted. Raises SourceError when there is none."""
        given, wanted = self.config.annotations, self.config.split_folders or {}
        if isinstance(given, str):
            files = [(self.config.split, self.config.split, given)]
        elif given:
            files = [(split, wanted.get(split, split), address) for split, address in given.items()]
        else:
            names = {match[1]: path for path in self.files.sizes if (match := _INSTANCES.fullmatch(path))}
            called = {folder: split for split, folder in wanted.items()}
            files = [
                (called.get(name) or SPLITS.get(name.rstrip("0123456789"), name), name, f"{self.files.address}/{path}")
                for name, path in names.items()
            ]
        files = sorted(file for file in files if not wanted or file[0] in wanted)
        if not files:
            raise SourceError(
                f"source {self.config.source} is not of layout coco: no instances_<split>.json in it or in its folder "
                "annotations (name the json with `annotations`)"
            )
        return files

    def _folder(self, name: str) -> str:
        """The folder of a split's images, with a slash; empty when they lie in the source itself."""
        choices = (f"{name}/", f"images/{name}/", "images/")
        return next((folder for folder in choices if any(path.startswith(folder) for path in self.files.sizes)), "")

    def _mask_classes(self, categories: Sequence[tuple[str, str]]) -> tuple[str, ...] | None:
        if self.config.masks_from != "polygons":
            return None
        if self.config.mask_level == "supercategory":
            return (BACKGROUND, *dict.fromkeys(supercategory for _, supercategory in categories))
        return (BACKGROUND, *(self.config.classes or [name for name, _ in categories]))

    def _ignore(self) -> int:
        return 255 if self.config.ignore_index is None else self.config.ignore_index


def _load(address: str) -> dict[str, Any]:
    """Raises SourceError for a file that is no COCO json."""
    try:
        content = json.loads(read_file(address))
        missing = [name for name in ("images", "annotations", "categories") if not isinstance(content[name], list)]
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"{address} is not a COCO json: {error!r} (it needs the lists images, annotations and categories)"
        ) from None
    if missing:
        raise SourceError(f"{address} is not a COCO json: {', '.join(missing)} must be a list")
    return content


def _by_image(
    content: Mapping[str, Any], categories: Mapping[int, tuple[str, str]], address: str
) -> tuple[dict[int, list[_Annotation]], list[dict[str, str]]]:
    """Annotations by image id, and a problem for each that belongs to nothing. Empties the json's own list."""
    known = {image["id"] for image in content["images"]}
    found: dict[int, list[_Annotation]] = {}
    problems = []
    for entry in _drain(content["annotations"]):
        name = f"annotation {entry.get('id')}"
        try:
            if entry["image_id"] not in known:
                raise ValueError(f"image_id {entry['image_id']} is not among the images")
            if entry["category_id"] not in categories:
                raise ValueError(f"category_id {entry['category_id']} is not among the categories")
            x, y, w, h = (float(value) for value in entry["bbox"])
            segmentation = entry.get("segmentation") or None
            text = None if segmentation is None else json.dumps(segmentation, separators=(",", ":")).encode()
            area = float(entry.get("area") or w * h)
            made = _Annotation(
                name, *categories[entry["category_id"]], (x, y, w, h), area, bool(entry.get("iscrowd")), text
            )
            found.setdefault(entry["image_id"], []).append(made)
        except (KeyError, TypeError, ValueError) as error:
            problems.append({"key": f"{posixpath.basename(address)}: {name}", "reason": f"left out: {error}"})
    return found, problems


def _drain(entries: list[Any]) -> Iterator[Any]:
    """The entries in order, each removed from the list: a large json is not held twice."""
    entries.reverse()
    while entries:
        yield entries.pop()


# ------------------------------------------------------------------------------------------------------ segmentations
def rasterise(segmentation: bytes, width: int, height: int) -> NDArray[np.bool_]:
    """The pixels inside a segmentation, (H, W); it must have passed `_check`."""
    from pycocotools import mask as coco_mask

    shape = json.loads(segmentation)
    if isinstance(shape, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(shape, height, width))
    elif isinstance(shape["counts"], list):
        rle = coco_mask.frPyObjects(shape, height, width)
    else:
        rle = {"size": shape["size"], "counts": shape["counts"].encode()}
    return coco_mask.decode(rle).astype(bool)


def _check(shape: Any, width: int, height: int) -> None:
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
    runs = _decompress(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or any(not isinstance(n, int) or n < 0 for n in runs) or sum(runs) != width * height:
        raise ValueError("its RLE runs do not add up to the image")


def _decompress(text: str) -> list[int]:
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
