"""Layout `davis`: video frames with masks. `JPEGImages/480p/<sequence>/00000.jpg`, `Annotations/480p/...png`.

DAVIS-2016 masks hold 0 and 255 and become classes 0 and 1; DAVIS-2017 masks are palette images, their indices are the
objects' numbers. A split is a list under ImageSets, of sequence names or of image and mask paths.
"""

from __future__ import annotations

import posixpath
from typing import Any

from numpy.typing import NDArray

from pipeline.errors import SourceError
from stages.data.images import probe
from stages.ingest.layout import Item, Layout, Listing, Raw, Vocabulary, binary_to_classes, stem, top_folders


class Davis(Layout):
    """Frames without a mask are kept, without one: in the test sets only the first frame is annotated."""

    def candidates(self) -> Listing:
        """The frames of all listed sequences, each with its mask where there is one."""
        folder = f"JPEGImages/{self._resolution()}/"
        splits = self._splits()
        items: list[Item] = []
        counters: dict[str, int] = {}
        for path in self.files.images(folder):
            sequence, _, frame = path.removeprefix(folder).rpartition("/")
            if splits is not None and sequence not in splits:
                continue
            counters[sequence] = counters.get(sequence, -1) + 1
            number = int(stem(frame)) if stem(frame).isdigit() else counters[sequence]
            mask: str | None = stem(path.replace("JPEGImages/", "Annotations/", 1)) + ".png"
            mask = mask if mask in self.files.sizes else None
            split = self.config.split if splits is None else splits[sequence]
            items.append(Item(path, split, self.files.sizes[path], path, mask, sequence=sequence, frame=number))
        vocabulary = self.mask_vocabulary(self._default_classes(items))
        notes = {"without_mask": sum(item.mask is None for item in items)}
        remarks = [self.without_lists()] if splits is None else []
        return Listing(items, vocabulary, self.unread(folder), notes, remarks=remarks)

    def mask(self, item: Item, raw: Raw, vocabulary: Vocabulary, size: tuple[int, int]) -> NDArray[Any] | None:
        """As stored, but for binary masks, whose 255 becomes class 1."""
        values = super().mask(item, raw, vocabulary, size)
        mapped = vocabulary.label_map is not None  # it speaks of the values as they are written
        if values is None or raw.mask is None or mapped or _numbers_objects(raw.mask):
            return values
        return binary_to_classes(values)

    def _resolution(self) -> str:
        inside = [path.removeprefix("JPEGImages/") for path in self.files.images("JPEGImages/")]
        found = [name for name in top_folders(inside) if name]
        wanted = self.config.resolution or ("480p" if "480p" in found or len(found) != 1 else found[0])
        if wanted not in found:
            raise SourceError(
                f"source {self.config.source} is not of layout davis: no images in JPEGImages/{wanted} "
                f"(there are: {', '.join(found) or 'none'}; set resolution to one of these)"
            )
        return wanted

    def _splits(self) -> dict[str, str] | None:
        """The split of each sequence; None where there are no lists."""
        lists = [path for path in self.files.sizes if path.startswith("ImageSets/") and path.endswith(".txt")]
        sets = sorted({posixpath.dirname(path) for path in lists})
        if not sets:
            return None
        wanted = f"ImageSets/{self.config.image_set}" if self.config.image_set else ""
        if wanted and wanted not in sets:
            raise SourceError(f"source {self.config.source} has no {wanted} (there are: {', '.join(sets)})")
        chosen = wanted or ("ImageSets/2017" if "ImageSets/2017" in sets else sets[0])
        splits: dict[str, str] = {}
        for path in lists:
            split = self.split_named(stem(posixpath.basename(path)))
            if posixpath.dirname(path) != chosen or split is None:
                continue
            for line in self.files.read(path).decode().split("\n"):
                if words := line.split():
                    name = posixpath.basename(posixpath.dirname(words[0])) if "/" in words[0] else words[0]
                    splits.setdefault(name, split)
        return splits

    def _default_classes(self, items: list[Item]) -> tuple[str, ...] | None:
        """Two classes where the first mask is binary; None, for any object number, where it is a palette image."""
        first = next((item.mask for item in items if item.mask), None)
        if first is None or _numbers_objects(self.files.read(first)):
            return None
        return ("background", "object")


def _numbers_objects(mask: bytes) -> bool:
    """Whether a mask is a palette image, as in DAVIS-2017: its indices are object numbers."""
    return probe(mask).mode == "P"
