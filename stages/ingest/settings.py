"""What a pipeline file says about an `ingest` stage.

Planning reads it: it imports nothing heavy, and of this room only `label_map.py`. Options that most sources do without
are left out of a dump where they are not set (`exclude_if`), and so out of the fingerprint.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from pipeline.stage import NoFingerprint, Settings, Source, StageConfig
from stages.ingest import label_map as label_maps

LayoutName = Literal["folder", "masks", "coco", "voc", "davis", "parquet"]

RAY_FROM = 2000  # images; for fewer, starting Ray tasks takes longer than they save

# Fields that mean something to some layouts only; set anywhere else they are a mistake.
_BELONGS = {
    "annotations": ("coco",),
    "masks_from": ("coco",),
    "mask_level": ("coco",),
    "crowd": ("coco",),
    "mask_source": ("coco",),
    "image_folder": ("masks",),
    "mask_folder": ("masks", "coco"),
    "image_suffix": ("masks",),
    "mask_suffix": ("masks", "coco"),
    "label_map": ("masks", "coco", "voc", "davis", "parquet"),
    "image_set": ("voc", "davis"),
    "resolution": ("davis",),
    "columns": ("parquet",),
    "ignore_index": ("masks", "coco", "voc", "davis", "parquet"),
}


def _unset(value: object) -> bool:
    return value is None


class Columns(Settings):
    """What the columns of a `parquet` source are called."""

    image: str = Field("image", description="encoded bytes, or a struct of bytes and path (Hugging Face datasets)")
    label: str = Field("label", description="class as a number or a name; no labels if the table has no such column")
    mask: str | None = Field(None, description="PNG of class indices, like the image bytes or a struct")
    split: str | None = Field(None, description="name of the split; default: from the file's or its folder's name")


class IngestConfig(StageConfig):
    """Where the images are and how to read them."""

    source: Source = Field(description="folder, Parquet file, or s3://, gs://, az:// address")
    layout: LayoutName = Field("folder", description="how the source is laid out")
    check_layout: Annotated[bool, NoFingerprint] = Field(
        True, description="refuse a source that looks like another layout; false insists on this one"
    )
    splits: list[str] | dict[str, str] | None = Field(
        None, description="splits to take, or split -> the folder or list it is called in the source; default: all"
    )
    split: str = Field("train", description="split of images whose place does not say one")
    classes: list[str] | None = Field(None, description="class names in order; default: what the source says")
    ignore_index: int | None = Field(
        None, ge=0, le=65535, description="mask value that counts for nothing; default: classes.json's, else 255"
    )
    label_map: Source | dict[int | str, str | int | list[int] | None] | None = Field(
        None,
        exclude_if=_unset,
        description="value -> class (null: ignored), or class -> values, or a JSON or YAML file of that, or a shipped "
        "map by its name; values that are not listed are ignored",
    )
    label: Literal["source", "none", "largest_object"] = Field(
        "source", description="an image's label: as the source has it, none, or the category of its largest object"
    )
    annotations: Source | dict[str, Source] | None = Field(
        None,
        description="coco: the json file, or split -> json file; default: instances_<split>.json in the source "
        "(panoptic_<split>.json with masks_from: panoptic)",
    )
    masks_from: Literal["none", "polygons", "panoptic", "folder"] = Field(
        "none",
        description="coco: polygons draws a mask of class indices, 0 for background; panoptic reads the segment ids of "
        "a panoptic json's PNGs; folder reads PNGs of class indices",
    )
    mask_level: Literal["category", "supercategory"] = Field(
        "category", description="coco: classes of a drawn or panoptic mask"
    )
    crowd: Literal["ignore", "class"] = Field(
        "ignore", description="coco: crowd regions of a drawn or panoptic mask get ignore_index, or their class"
    )
    mask_source: Source | None = Field(
        None, exclude_if=_unset, description="coco: folder of the mask PNGs where they lie outside of the source"
    )
    image_folder: str = Field("images", description="masks: folder of the images")
    mask_folder: str = Field("masks", description="masks, coco: folder of the masks; coco finds panoptic_<split>")
    image_suffix: str = Field("", description="masks: end of an image's name that its mask's does not have")
    mask_suffix: str = Field("", description="masks, coco: end of a mask's name that its image's does not have")
    image_set: str | None = Field(None, description="voc, davis: folder under ImageSets; default: Main, 2017")
    resolution: str | None = Field(None, description="davis: folder under JPEGImages; default: 480p")
    columns: Columns = Field(Columns(), description="parquet: what its columns are called")
    on_error: Literal["skip", "fail"] = Field(
        "skip", description="an unreadable image is left out and named, or stops the stage"
    )
    max_pixels: int = Field(
        64_000_000, ge=1, le=89_478_485, description="larger images are refused before they are decoded"
    )
    limit: int | None = Field(None, ge=1, description="at most so many images, spread evenly over the sorted keys")
    shard_rows: int | None = Field(None, ge=1, description="images a shard at most; default: n/32, between 16 and 1024")
    shard_mb: int = Field(256, ge=1, description="megabytes of images a shard at most")

    @property
    def split_folders(self) -> dict[str, str] | None:
        """The folder or list of each split in the source; None when the config leaves it to the source."""
        return {name: name for name in self.splits} if isinstance(self.splits, list) else self.splits

    @field_validator("label_map", mode="before")
    @classmethod
    def _known_map(cls, written: Any) -> Any:
        """A shipped map by its name becomes its content, which then belongs to the fingerprint."""
        if isinstance(written, str) and written in label_maps.shipped():
            return yaml.safe_load((label_maps.SHIPPED / f"{written}.yaml").read_text())
        if isinstance(written, str) and not written.endswith((".json", ".yaml", ".yml")):
            raise ValueError(
                f"{written!r} is neither a file of JSON or YAML nor a shipped map ({', '.join(label_maps.shipped())})"
            )
        if isinstance(written, dict):
            label_maps.parse(written)
        return written

    @model_validator(mode="after")
    def _fits_layout(self) -> IngestConfig:
        for name in sorted(self.model_fields_set):
            if name in _BELONGS and self.layout not in _BELONGS[name]:
                raise ValueError(f"{name} is for layout {' or '.join(_BELONGS[name])}, this is {self.layout}")
        drawn = self.layout == "coco" and self.masks_from in ("none", "polygons")
        for name in sorted(self.model_fields_set & {"label_map", "mask_source", "mask_folder", "mask_suffix"}):
            if drawn:
                raise ValueError(
                    f"{name} is for masks that are files, this has masks_from: {self.masks_from} (masks_from: panoptic "
                    "or folder reads them; mask_level: supercategory makes drawn classes coarse)"
                )
        if self.label_map is not None and self.classes and self.layout in ("masks", "davis"):
            raise ValueError("label_map names the classes of the masks itself: leave classes out")
        if self.label == "largest_object" and self.layout not in ("coco", "voc"):
            raise ValueError(f"label: largest_object needs a layout with objects (coco, voc), this is {self.layout}")
        return self
