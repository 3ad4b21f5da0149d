"""The classes of an `images` artifact's masks, and stored masks as labels: what `segment_linear` is scored against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SourceError
from stages.data.images import ImageError, decode_mask

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact

MaskLabels = NDArray[np.int16]  # (H, W) index into MaskClasses.names; -1 where the pixel does not count (void)

_UNKNOWN = -2  # a value that no class has


@dataclass(frozen=True)
class MaskClasses:
    """The classes that count: all of the masks' but the ignored one."""

    names: list[str]
    values: list[int]  # what a stored mask holds for each name
    ignore_index: int

    @classmethod
    def of(cls, images: Artifact) -> MaskClasses:
        """The classes that the images' notes name. Raises SourceError where they name none."""
        notes = images.manifest.notes
        names: list[str] = list(notes.get("mask_classes") or ())
        ignore = int(notes.get("ignore_index", 255))
        values = [value for value in range(len(names)) if value != ignore]
        if not values:
            raise SourceError(
                f"{images.manifest.stage or images.name} names no classes for its masks (notes.mask_classes): "
                "ingest it with a layout that has masks, and name its `classes`"
            )
        return cls([names[value] for value in values], values, ignore)

    def labels(self, data: bytes, shape: tuple[int, ...]) -> MaskLabels:
        """A stored mask as labels.

        Args:
            data: the encoded mask.
            shape: (height, width) of its image.

        Raises: ImageError for a mask of another size or with a value that is no class.
        """
        mask = decode_mask(data)
        if mask.shape != shape:
            raise ImageError(f"its mask is {mask.shape[1]}x{mask.shape[0]}, the image {shape[1]}x{shape[0]}")
        label_of_value = np.full(65536, _UNKNOWN, np.int16)
        label_of_value[self.values] = np.arange(len(self.values))
        label_of_value[self.ignore_index] = -1
        labels: MaskLabels = label_of_value[mask]
        if (labels == _UNKNOWN).any():
            raise ImageError(f"its mask has the value {int(mask[labels == _UNKNOWN][0])}, which is no class")
        return labels
