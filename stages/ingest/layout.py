"""The base of the source formats: which images there are, and how one of them becomes bytes, a mask and objects.

Each format is one file beside this one. The stage makes a layout and lists the source with it; Ray workers get a copy,
which only reads.
"""

from __future__ import annotations

import json
import posixpath
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SourceError
from stages.data.images import ImageError, decode_mask
from stages.ingest import label_map as label_maps
from stages.ingest.files import JPEG_SUFFIXES, Files, read_file
from stages.ingest.label_map import LabelMap
from stages.ingest.recognise import SPLITS
from stages.ingest.settings import IngestConfig


@dataclass(frozen=True, slots=True)
class Item:
    """One candidate: an image that is listed, not yet read."""

    key: str  # path relative to the source, unique; the artifact's rows are in the order of the keys
    split: str
    size: int  # bytes, for cutting shards; an estimate where only the whole table's size is known
    image: str = ""  # path of the file, where it is a file of its own
    mask: str | None = None
    label: str | None = None
    sequence: str | None = None
    frame: int | None = None
    annotation: Any = None  # what the layout itself needs to find the image's objects or its row


@dataclass(frozen=True)
class Vocabulary:
    """The names behind the numbers; goes into the artifact's notes."""

    classes: tuple[str, ...] = ()  # label_id and an object's category_id are indices into it
    mask_classes: tuple[str, ...] | None = None  # a mask's values are indices into it; None: take any value
    ignore_index: int = 255  # a mask's value that counts for nothing
    label_map: LabelMap | None = None  # from the source's mask values to mask_classes


@dataclass
class Listing:
    """The candidates in key order, and what was wrong before any of them was opened."""

    items: list[Item]
    vocabulary: Vocabulary = Vocabulary()
    problems: list[dict[str, str]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)  # for the artifact's, beside the stage's own
    remarks: list[str] = field(default_factory=list)  # sentences for the user


@dataclass(frozen=True)
class Raw:
    """The bytes of one candidate, as found."""

    image: bytes
    mask: bytes | None = None
    objects: bytes | None = None  # an annotation file of its own (VOC)


@dataclass(frozen=True)
class SourceObject:
    """One object of an image, as far as its source describes it."""

    box: tuple[float, float, float, float]  # x0, y0, x1, y1
    category: str
    crowd: bool = False
    mask: bytes | None = None
    area: float = 0.0  # of the mask where there is one, else of the box: `largest_object` goes by it


class Layout(ABC):
    """Base of the source formats. `objects` and `mask` do nothing unless a format has them."""

    has_objects: ClassVar[bool] = False

    def __init__(self, config: IngestConfig) -> None:
        self.config = config
        self.files = self.mask_files = Files(config.source)

    @abstractmethod
    def candidates(self) -> Listing:
        """Every candidate. Raises SourceError when the source is not of this layout at all."""

    def reader(self, items: Sequence[Item]) -> Callable[[Item], Raw]:
        """A function that reads any of `items`; a format whose images share files reads those files here.

        The function raises ImageError for an image that cannot be read.
        """
        return self.read

    def read(self, item: Item) -> Raw:
        """The bytes of one candidate whose image is a file of its own. Raises ImageError."""
        return Raw(self.files.read(item.image), None if item.mask is None else self._read_mask(item.mask))

    def mask(self, item: Item, raw: Raw, vocabulary: Vocabulary, size: tuple[int, int]) -> NDArray[Any] | None:
        """The image's mask as class indices, (H, W); None where it has no mask.

        Args:
            item: the candidate.
            raw: its bytes.
            vocabulary: the classes, and the value that is ignored.
            size: (width, height) of the image in pixels, upright.

        Raises: ImageError for a mask that cannot be read.
        """
        return None if raw.mask is None else decode_mask(raw.mask, max_pixels=self.config.max_pixels)

    def objects(self, item: Item, raw: Raw, size: tuple[int, int]) -> tuple[Sequence[SourceObject], Sequence[str]]:
        """The objects of an image, and a reason for each that had to be left out.

        Args:
            item: the candidate.
            raw: its bytes.
            size: (width, height) of the image in pixels, upright.

        Raises: ImageError for an annotation that cannot be read or belongs to another image.
        """
        return (), ()

    def _read_mask(self, path: str) -> bytes:
        try:
            return self.mask_files.read(path)
        except ImageError as error:
            raise ImageError(f"its mask {path} {error}") from None

    def error_for(self, problem: Mapping[str, str]) -> SourceError:
        """What `on_error: fail` raises at the first problem."""
        return SourceError(
            f"source {self.config.source}: {problem['key']}: {problem['reason']} "
            "(on_error: fail stops here; on_error: skip leaves it out and names it)"
        )

    # --------------------------------------------------------------------------------------------- shared by formats
    def split_folders(self, folders: Sequence[str]) -> dict[str, str]:
        """The split of each folder, for folders that hold a split each; empty where they do not.

        Without `splits` in the config, folders are splits only if all of them have a split's name.
        """
        wanted = self.config.split_folders
        if wanted is not None:
            if missing := [folder for folder in wanted.values() if folder not in folders]:
                raise SourceError(
                    f"source {self.config.source} has no folder {', '.join(missing)} for `splits` "
                    f"(there are: {', '.join(folders) or 'none'})"
                )
            return {folder: split for split, folder in wanted.items()}
        if folders and all(folder.lower() in SPLITS for folder in folders):
            return {folder: SPLITS[folder.lower()] for folder in folders}
        return {}

    def split_named(self, name: str) -> str | None:
        """The split that a list or table of this name holds; None when the config does not want it."""
        wanted = self.config.split_folders
        if wanted is None:
            return SPLITS.get(name.lower())
        return next((split for split, folder in wanted.items() if folder == name), None)

    def classes_file(self) -> dict[str, Any]:
        """The source's `classes.json`; empty where it has none. Raises SourceError for one that cannot be used."""
        if "classes.json" not in self.files.sizes:
            return {}
        place = f"{self.config.source}/classes.json"
        try:
            found = json.loads(self.files.read("classes.json"))
            names = found["classes"]
            if isinstance(names, Mapping):
                names = [names[str(i)] for i in range(len(names))]
            ignore = found.get("ignore_index", 255)
            if not all(isinstance(name, str) for name in names) or not isinstance(ignore, int):
                raise TypeError("names must be strings and ignore_index an integer")
        except (ValueError, KeyError, TypeError, ImageError) as error:
            raise SourceError(
                f'{place} is not usable: {error!r} (it needs {{"classes": [names] or {{"0": name, ...}}, '
                '"ignore_index": number})'
            ) from None
        return {"classes": tuple(names), "ignore_index": ignore}

    def mask_vocabulary(self, default: tuple[str, ...] | None = None) -> Vocabulary:
        """Names and ignore value of masks: from the label map, else the config, classes.json, the format's own.

        Raises: SourceError for a label map or a classes.json that cannot be used.
        """
        if (mapped := self.label_map()) is not None:
            return self.mapped_vocabulary(mapped)
        file = self.classes_file()
        classes = tuple(self.config.classes) if self.config.classes else file.get("classes", default)
        ignore = self.config.ignore_index
        return Vocabulary((), classes, file.get("ignore_index", 255) if ignore is None else ignore)

    def mapped_vocabulary(self, mapped: LabelMap) -> Vocabulary:
        """The names and the ignore value of masks that a label map translates. Raises SourceError."""
        count, ignore = len(mapped.names), self.config.ignore_index
        if ignore is None:
            ignore = 255 if count <= 255 else label_maps.VOID
        elif ignore < count:
            raise SourceError(
                f"ignore_index {ignore} is one of the {count} classes that the label map of {self.config.source} makes "
                f"(leave it out, or set it to {count} or more)"
            )
        return Vocabulary((), mapped.names, ignore, mapped)

    def label_map(self) -> LabelMap | None:
        """The config's label map; None without one. Raises SourceError for a file that cannot be used."""
        written = self.config.label_map
        if isinstance(written, str):
            return label_maps.read(read_file(written), written)
        return None if written is None else label_maps.parse(written)

    def without_lists(self) -> str:
        """What is said of a source without ImageSets."""
        return f"no lists in ImageSets: every image is of split {self.config.split} (set split, or write the lists)"

    def unread(self, under: str = "") -> list[dict[str, str]]:
        """A problem for each image below `under` whose format is not read."""
        other = "not a format that is read (JPEG, PNG, WebP, BMP): convert it"
        jpeg = "not an ending that is read: rename it to .jpg"
        paths = self.files.unread(under)
        return [{"key": path, "reason": jpeg if path.lower().endswith(JPEG_SUFFIXES) else other} for path in paths]


def top_folders(paths: Sequence[str]) -> list[str]:
    """The first folders of these paths, sorted; "" stands for files that lie in none."""
    return sorted({path.split("/", 1)[0] if "/" in path else "" for path in paths})


def stem(path: str) -> str:
    """The path without its ending."""
    return posixpath.splitext(path)[0]


def binary_to_classes(values: NDArray[Any]) -> NDArray[Any]:
    """0 and 255, as binary masks are commonly stored, to classes 0 and 1; anything else unchanged."""
    present = np.unique(values)
    return (values == 255).astype(np.uint8) if np.isin(present, (0, 255)).all() else values
