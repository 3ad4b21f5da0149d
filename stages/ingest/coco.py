"""Layout `coco`: images and COCO json files with boxes, polygons and crowd regions (RLE, compressed or not).

Segmentations are kept per object as the json has them. `masks_from` gives each image a mask of class indices too: drawn
from them, read from a panoptic json's PNGs, or from PNGs in a folder (`coco_masks.py`).
"""

from __future__ import annotations

import json
import math
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SourceError
from stages.data.images import ImageError
from stages.data.object_masks import rasterise
from stages.ingest.coco_masks import (
    Segment,
    as_instances,
    category_ids,
    category_map,
    check_shape,
    mask_path,
    without_polygons,
)
from stages.ingest.files import Files, read_file
from stages.ingest.label_map import VOID
from stages.ingest.layout import Item, Layout, Listing, Raw, SourceObject, Vocabulary, stem
from stages.ingest.recognise import JSONS, SPLITS
from stages.ingest.settings import IngestConfig

BACKGROUND = "background"


class _Annotation(NamedTuple):
    """One object as the json has it, small enough to hold a million of."""

    name: str
    category: str
    supercategory: str
    box: tuple[float, float, float, float]  # x, y, width, height
    area: float
    crowd: bool
    segmentation: bytes | None  # json


class _Detail(NamedTuple):
    """What the jsons say about one image."""

    size: tuple[int | None, int | None]
    objects: tuple[_Annotation, ...]
    segments: tuple[Segment, ...]


class Coco(Layout):
    """Images of split S lie in `S/` or `images/S/`, or in `images/` or the source itself where there is no such folder.

    Without `annotations`, the source's own are taken: `instances_S.json`, in it or in its folder `annotations`.
    """

    has_objects: ClassVar[bool] = True

    def __init__(self, config: IngestConfig) -> None:
        super().__init__(config)
        if config.mask_source is not None:
            self.mask_files = Files(config.mask_source)

    def candidates(self) -> Listing:
        """The images that the jsons list, with their annotations."""
        items: dict[str, Item] = {}
        problems: list[dict[str, str]] = []
        categories: dict[int, tuple[str, str]] = {}
        for split, name_there, address in self._annotation_files():
            content = _load(address)
            categories |= {c["id"]: (c["name"], c.get("supercategory", c["name"])) for c in content["categories"]}
            if self._kind == "instances" and any("segments_info" in entry for entry in content["annotations"][:1]):
                raise SourceError(f"{address} is a panoptic json (set masks_from: panoptic)")
            masks = as_instances(content, address) if self.config.masks_from == "panoptic" else {}
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
                    png, segments = masks.get(image["id"], (f"{stem(name)}{self.config.mask_suffix}.png", ()))
                    mask = self._mask_file(png, name_there, split)
                    if mask is None and self.config.masks_from in ("panoptic", "folder"):
                        problems.append({"key": key, "reason": f"kept without a mask: there is no {png}"})
                    detail = _Detail(stated, tuple(annotations.pop(image["id"], ())), segments)
                    items[key] = Item(key, split, self.files.sizes[key], key, mask, annotation=detail)
        counts: dict[str, int] = {}
        if self.config.masks_from == "polygons":
            objects = {key: item.annotation.objects for key, item in items.items()}
            problems += without_polygons(objects, self.config.source)
            counts = {"without_polygon": sum(e.segmentation is None for entries in objects.values() for e in entries)}
        elif self.config.masks_from != "none" and items and not any(item.mask for item in items.values()):
            raise SourceError(
                f"source {self.config.source}: masks_from: {self.config.masks_from}, but none of its {len(items)} "
                f"images has a mask in {', '.join(folder or '.' for folder in self._mask_folders('<split>'))} (set "
                "mask_folder, mask_suffix, or mask_source where the masks lie outside of the source)"
            )
        ordered = sorted(categories)
        names = tuple(self.config.classes or [categories[number][0] for number in ordered])
        vocabulary = replace(self._masks_vocabulary(categories), classes=names)
        notes = {"category_ids": ordered, "supercategories": [categories[number][1] for number in ordered]}
        counts = {name: count for name, count in counts.items() if count}
        return Listing(sorted(items.values(), key=lambda item: item.key), vocabulary, problems, notes, counts)

    def objects(self, item: Item, raw: Raw, size: tuple[int, int]) -> tuple[Sequence[SourceObject], Sequence[str]]:
        """Boxes clipped to the image; an object whose box or segmentation cannot be used is left out."""
        width, height = size
        stated, annotations, _ = item.annotation
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
                        check_shape(json.loads(entry.segmentation), width, height)
                except ValueError as error:
                    left_out.append(f"{entry.name}: {error}")
                else:
                    found.append(SourceObject(box, entry.category, entry.crowd, entry.segmentation, entry.area))
        return found, left_out

    def mask(self, item: Item, raw: Raw, vocabulary: Vocabulary, size: tuple[int, int]) -> NDArray[Any] | None:
        """Drawn: large objects first, so that a cup on a table stays a cup; crowd regions below all of them."""
        if self.config.masks_from == "panoptic" and raw.mask is not None:
            counts = self.config.crowd == "class"
            segments, most = item.annotation.segments, self.config.max_pixels
            return category_ids(raw.mask, segments, crowd_counts=counts, max_pixels=most)
        if self.config.masks_from != "polygons" or vocabulary.mask_classes is None:
            return super().mask(item, raw, vocabulary, size)
        width, height = size
        top = max(len(vocabulary.mask_classes), vocabulary.ignore_index)
        drawn = np.zeros((height, width), np.uint8 if top < 256 else np.uint16)
        found, _ = self.objects(item, raw, size)
        level = {entry.category: entry.supercategory for entry in item.annotation.objects}
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
            name_there = JSONS[self._kind]
            names = {match[1]: path for path in self.files.sizes if (match := name_there.fullmatch(path))}
            called = {folder: split for split, folder in wanted.items()}
            files = [
                (called.get(name) or SPLITS.get(name.rstrip("0123456789"), name), name, f"{self.files.address}/{path}")
                for name, path in names.items()
            ]
        files = sorted(file for file in files if not wanted or file[0] in wanted)
        if not files:
            raise SourceError(
                f"source {self.config.source} is not of layout coco: no {self._kind}_<split>.json in it or in its "
                "folder annotations (name the json with `annotations`)"
            )
        return files

    def _folder(self, name: str) -> str:
        """The folder of a split's images, with a slash; empty when they lie in the source itself."""
        choices = (f"{name}/", f"images/{name}/", "images/")
        return next((folder for folder in choices if any(path.startswith(folder) for path in self.files.sizes)), "")

    @property
    def _kind(self) -> str:
        return "panoptic" if self.config.masks_from == "panoptic" else "instances"

    def _mask_folders(self, name: str) -> list[str]:
        """Where the mask of an image of a split may be, each with a slash; "" for the source of the masks itself."""
        given = "mask_folder" in self.config.model_fields_set
        if given or (self.config.masks_from == "folder" and self.config.mask_source is None):
            return [f"{self.config.mask_folder}/{name}/", f"{self.config.mask_folder}/"]
        panoptic = [f"panoptic_{name}/", f"annotations/panoptic_{name}/"] if self._kind == "panoptic" else []
        return [*panoptic, f"{name}/", *([""] if self.config.mask_source is not None else [])]

    def _mask_file(self, png: str, name_there: str, split: str) -> str | None:
        if self.config.masks_from not in ("panoptic", "folder"):
            return None
        folders = dict.fromkeys([*self._mask_folders(name_there), *self._mask_folders(split)])
        return mask_path([png, posixpath.basename(png)], folders, self.mask_files.sizes)

    def _masks_vocabulary(self, categories: Mapping[int, tuple[str, str]]) -> Vocabulary:
        """The classes of the masks. Raises SourceError for categories that a mask cannot hold."""
        config, level = self.config, int(self.config.mask_level == "supercategory")
        ignore = 255 if config.ignore_index is None else config.ignore_index
        if config.masks_from == "none":
            return Vocabulary((), None, ignore)
        if config.masks_from == "polygons":
            ordered = [categories[number] for number in sorted(categories)]
            fine = None if level else config.classes
            return Vocabulary((), (BACKGROUND, *(fine or dict.fromkeys(entry[level] for entry in ordered))), ignore)
        mapped = self.label_map()
        if config.masks_from == "folder":
            file = {} if mapped else self.classes_file()
            default = Vocabulary((), file.get("classes"), file.get("ignore_index", 255))
            if mapped is None:
                return default if config.ignore_index is None else replace(default, ignore_index=ignore)
            return self.mapped_vocabulary(mapped)
        if wrong := [number for number in categories if not 0 <= number < VOID]:
            raise SourceError(f"source {config.source}: category id {wrong[0]} is not one that a mask can hold")
        mapped = mapped or category_map(categories, coarse=bool(level))
        return self.mapped_vocabulary(replace(mapped, ignored=mapped.ignored | {VOID}))


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
