"""Layout `voc`: `JPEGImages`, `Annotations` (XML boxes), `SegmentationClass` (palette masks), `ImageSets` (splits)."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar
from xml.etree import ElementTree

from pipeline.errors import SourceError
from stages.data.images import ImageError
from stages.ingest.layout import Item, Layout, Listing, Raw, SourceObject, stem

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


class Voc(Layout):
    """Boxes and masks are each optional per image; with `image_set: Segmentation` an image without a mask is skipped.

    VOC's `difficult` objects become crowd: for both, an evaluation counts neither a hit nor a miss.
    """

    has_objects: ClassVar[bool] = True

    def candidates(self) -> Listing:
        """The images that the lists name; all of them where there are no lists."""
        images = {stem(posixpath.basename(path)): path for path in self.files.images("JPEGImages/")}
        if not images:
            raise SourceError(f"source {self.config.source} is not of layout voc: no images in JPEGImages/")
        problems = self.unread("JPEGImages/")
        chosen, splits = self._splits()
        if splits is None:
            splits = dict.fromkeys(images, self.config.split)
        items = []
        for name, split in splits.items():
            if (path := images.get(name)) is None:
                problems.append({"key": f"JPEGImages/{name}.jpg", "reason": f"named in {chosen}, but not there"})
                continue
            mask: str | None = f"SegmentationClass/{name}.png"
            mask = mask if mask in self.files.sizes else None
            if mask is None and chosen == "ImageSets/Segmentation":
                problems.append({"key": path, "reason": f"no mask SegmentationClass/{name}.png"})
                continue
            xml = f"Annotations/{name}.xml"
            annotation = xml if xml in self.files.sizes else None
            items.append(Item(path, split, self.files.sizes[path], path, mask, annotation=annotation))
        classes = tuple(self.config.classes or CLASSES)
        vocabulary = self.mask_vocabulary()
        mask_classes = ("background", *classes) if vocabulary.label_map is None else vocabulary.mask_classes
        vocabulary = replace(vocabulary, classes=classes, mask_classes=mask_classes)
        remarks = [] if chosen else [self.without_lists()]
        return Listing(sorted(items, key=lambda item: item.key), vocabulary, problems, remarks=remarks)

    def read(self, item: Item) -> Raw:
        """The image, its mask and its XML file, where there are such."""
        raw = super().read(item)
        return raw if item.annotation is None else replace(raw, objects=self.files.read(item.annotation))

    def objects(self, item: Item, raw: Raw, size: tuple[int, int]) -> tuple[Sequence[SourceObject], Sequence[str]]:
        """Boxes counted from 0, the end excluded; an object without a usable box or known class is left out."""
        if raw.objects is None:
            return (), ()
        width, height = size
        root = _parse(raw.objects, item.annotation)
        stated = tuple(int(float(root.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
        if all(stated) and stated != size:
            raise ImageError(f"{item.annotation} says {stated[0]}x{stated[1]} pixels, the image has {width}x{height}")
        found, left_out = [], []
        for number, entry in enumerate(root.iter("object"), 1):
            category = (entry.findtext("name") or "").strip()
            try:
                x0, y0, x1, y1 = (float(entry.findtext(f"bndbox/{k}") or "") for k in ("xmin", "ymin", "xmax", "ymax"))
            except ValueError:
                left_out.append(f"object {number} ({category}): it has no box of four numbers")
                continue
            # VOC counts pixels from 1 and includes both ends
            box = (max(x0 - 1, 0.0), max(y0 - 1, 0.0), min(x1, float(width)), min(y1, float(height)))
            if not (box[0] < box[2] and box[1] < box[3]):
                left_out.append(f"object {number} ({category}): its box covers nothing of the image")
            elif category not in (self.config.classes or CLASSES):
                left_out.append(f"object {number}: {category!r} is not among the classes (set classes)")
            else:
                area = (box[2] - box[0]) * (box[3] - box[1])
                found.append(SourceObject(box, category, entry.findtext("difficult") == "1", None, area))
        return found, left_out

    def _splits(self) -> tuple[str, dict[str, str] | None]:
        """The ImageSets folder in use and image name -> split; None where there are no lists."""
        lists = [path for path in self.files.sizes if path.startswith("ImageSets/") and path.endswith(".txt")]
        sets = sorted({posixpath.dirname(path) for path in lists})
        wanted = f"ImageSets/{self.config.image_set}" if self.config.image_set else ""
        if wanted and wanted not in sets:
            raise SourceError(f"source {self.config.source} has no {wanted} (there are: {', '.join(sets) or 'none'})")
        if not sets:
            return "", None
        chosen = wanted or ("ImageSets/Main" if "ImageSets/Main" in sets else sets[0])
        splits: dict[str, str] = {}
        for path in lists:
            split = self.split_named(stem(posixpath.basename(path)))  # None for trainval and the lists of one class
            if posixpath.dirname(path) == chosen and split is not None:
                for line in self.files.read(path).decode().split("\n"):
                    if words := line.split():
                        splits.setdefault(words[0], split)
        return chosen, splits


def _parse(data: bytes, path: str) -> ElementTree.Element:
    """The root of an annotation file. Raises ImageError."""
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        raise ImageError(f"{path} declares entities, which an annotation never needs")
    try:
        return ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise ImageError(f"{path} is not XML: {error}") from None
