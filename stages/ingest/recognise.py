"""Which of the known layouts a source looks like, from the names of its files alone, and whether the config agrees.

Asked when the plan is made and again when the source is read. A folder of classes may be called anything, so a layout
counts as recognised only by signs that class folders do not have: names of files or folders that belong together, and
endings. Planning imports this file: nothing heavy at its top.
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.stage import local_path
from stages.ingest.files import SUFFIXES, UNREAD_SUFFIXES
from stages.ingest.settings import IngestConfig, LayoutName

JSONS = {  # what the jsons of a COCO source are called, by what they hold
    "instances": re.compile(r"(?:annotations/)?instances_(\w+)\.json"),
    "panoptic": re.compile(r"(?:annotations/)?panoptic_(\w+)\.json"),
}
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_MASKS_OF_COCO = re.compile(r"(?:annotations/)?(?:panoptic_|stuff)[^/]*/.*\.png")
_IMAGE_FOLDERS = {"image", "images", "img", "imgs", "photo", "photos", "jpegimages", "leftimg8bit", "input", "inputs"}
_MASK_FOLDERS = {
    "annotation", "annotations", "ground_truth", "groundtruth", "gt", "gtcoarse", "gtfine", "label", "labels", "mask",
    "masks", "seg", "segmentation", "segmentationclass", "segmentations", "semantic", "stuffthingmaps",
}  # fmt: skip
_MASK_SUFFIXES = (".png", ".bmp")
_DEPTH = 3  # folders that are opened one inside the other while each holds nothing but the next
_SHOWN = 3
_SAMPLE = 500  # masks whose names are compared with those of the images


@dataclass(frozen=True)
class Look:
    """A layout that a source looks like."""

    layout: LayoutName
    words: str  # what was seen
    settings: str  # what a config says for it, beside `layout`
    photographs: str = ""  # the folder of the images alone, where masks lie beside them
    mixed: bool = True  # files that end like images, and are none, lie among them
    under: str = ""  # the folder in which all of it lies, where that is not the source itself


def split_of(folder: str) -> str | None:
    """The split that a folder's name stands for, also with a year as in train2017; None for other names."""
    return SPLITS.get(folder.lower().rstrip("0123456789").rstrip("_-"))


def recognise(paths: Sequence[str]) -> list[Look]:
    """The layouts that a listing looks like, the surest first; empty for plain images and class folders."""
    under = ""
    for _ in range(_DEPTH):
        if found := _looks(paths):
            return [replace(look, under=under) for look in found]
        tops = {path.partition("/")[0] if "/" in path else "" for path in paths}
        if len(tops) != 1 or "" in tops:
            return []
        top = tops.pop()
        under = posixpath.join(under, top)
        paths = [path.removeprefix(f"{top}/") for path in paths]
    return []


def contradiction(config: IngestConfig, paths: Sequence[str]) -> tuple[str, str] | None:
    """What speaks against reading a source as the config says, and what to do; None where nothing does.

    Args:
        config: with the layout that was chosen.
        paths: every file of the source, relative to it.
    """
    if not paths or not config.check_layout:
        return None
    place = f"source {config.source}"
    missing = _missing(config, paths)
    folders = config.split_folders
    if config.layout == "folder" and folders is not None:  # the config names the folders that hold photographs
        paths = [path for path in paths if path.split("/", 1)[0] in folders.values()]
    found = recognise(paths)
    if config.layout == "folder" and config.label == "none":
        found = [look for look in found if look.mixed]  # else the photographs are right, only their folders no labels
    if missing is None and (config.layout != "folder" or not found):
        return None
    words, look = "", found[0] if found else None
    if look is not None:
        words = f"looks like {look.words}" + (f", in its folder {look.under}" if look.under else "")
    if missing is not None:
        lacks = " has no image" if config.layout == "folder" else f" is not of layout {config.layout}"
        what = f"{place}{lacks}: {missing[0]}" + (f"; it {words}" if words else "")
        return what, (_remedy(config, look) if look else _plain(config, paths)) + missing[1]
    assert look is not None
    remedy = _remedy(config, look)
    if look.photographs:
        alone = posixpath.join(config.source, look.under, look.photographs)
        remedy += f"; for the photographs alone: source: {alone}"
    elif look.layout == "coco":
        remedy += f"; for the photographs alone: {'name their folder as source' if look.mixed else 'label: none'}"
    return f"{place} {words}, not class folders", f"{remedy}; check_layout: false insists on class folders"


def is_file(source: str) -> bool:
    """Whether a local source is one file."""
    return local_path(source).is_file()


def of_file(config: IngestConfig) -> tuple[str, str]:
    """What is wrong with a source that is one file, and what to do."""
    source, name = config.source, config.source.lower()
    if name.endswith(".parquet"):
        return f"source {source} is a Parquet file, and the layout is {config.layout}", "set layout: parquet"
    if name.endswith(".json"):
        remedy = f"set layout: coco, annotations: {source}, and source to the folder of its images"
        return f"source {source} is a file: it looks like a COCO json", remedy
    if name.endswith((".zip", ".tar", ".tgz", ".gz", ".7z", ".rar")):
        return f"source {source} is an archive", "unpack it, and name the folder"
    return f"source {source} is a file; layout {config.layout} reads a folder", "name the folder that holds the images"


def _missing(config: IngestConfig, paths: Sequence[str]) -> tuple[str, str] | None:
    """What the chosen layout cannot do without and the source does not have, and what else may help.

    None where it has all of it.
    """
    if config.layout == "masks":
        images, masks = f"{config.image_folder}/", f"{config.mask_folder}/"
        inner = [_after_split(path, (images, masks)) for path in paths]
        if not any(path.startswith(images) and _is_image(path) for path in inner) or not any(
            path.startswith(masks) for path in inner
        ):
            what = f"it needs images in {images} and PNG masks in {masks}"
            return what, "; or set image_folder and mask_folder to what they are called"
    elif config.layout == "coco" and not config.annotations:
        kind = "panoptic" if config.masks_from == "panoptic" else "instances"
        if not any(JSONS[kind].fullmatch(path) for path in paths):
            what = f"no {kind}_<split>.json in it or in its folder annotations"
            return what, "; or name the json with `annotations`"
    elif config.layout == "voc":
        if not any(re.fullmatch(r"JPEGImages/[^/]+", path) and _is_image(path) for path in paths):
            return "no images in JPEGImages/", ""
    elif config.layout == "davis":
        if not any(re.fullmatch(r"JPEGImages/.+/.+", path) and _is_image(path) for path in paths):
            return "no images in JPEGImages/<resolution>/<sequence>/", ""
    elif config.layout == "parquet":
        if not any(path.endswith(".parquet") for path in paths):
            return "no *.parquet file in it", ""
    elif not any(path.lower().endswith((*SUFFIXES, *UNREAD_SUFFIXES)) for path in paths):
        return f"no file in it ends like an image ({_endings(paths)})", ""
    return None


def _plain(config: IngestConfig, paths: Sequence[str]) -> str:
    """The remedy where no other layout is recognised."""
    images = [path for path in paths if _is_image(path)]
    if config.layout == "folder" or not images:
        return "name the folder that holds the images; archives must be unpacked"
    inner = [_without_split(path) for path in images]
    folders = sorted({path.split("/", 1)[0] for path in inner if "/" in path})
    if not folders:
        return "it looks like photographs without classes: set layout: folder"
    shown = ", ".join(folders[:_SHOWN]) + (", ..." if len(folders) > _SHOWN else "")
    return f"it looks like class folders ({shown}): set layout: folder"


def _remedy(config: IngestConfig, look: Look) -> str:
    source = f", source: {posixpath.join(config.source, look.under)}" if look.under else ""
    layout = "" if look.layout == config.layout and (source or look.settings) else f"layout: {look.layout}"
    return "set " + (layout + source + (f", {look.settings}" if look.settings else "")).removeprefix(", ")


# ------------------------------------------------------------------------------------------------------ the layouts
def _looks(paths: Sequence[str]) -> list[Look]:
    return [look for look in (_davis(paths), _voc(paths), _coco(paths), _masks(paths), _parquet(paths)) if look]


def _davis(paths: Sequence[str]) -> Look | None:
    for path in paths:
        if found := re.fullmatch(r"JPEGImages/([^/]+)/[^/]+/[^/]+", path):
            if not _is_image(path):
                continue
            resolution = "" if found[1] == "480p" else f"resolution: {found[1]}"
            words = "DAVIS (JPEGImages/<resolution>/<sequence>/)"
            return Look("davis", words, resolution, f"JPEGImages/{found[1]}")
    return None


def _voc(paths: Sequence[str]) -> Look | None:
    images = any(re.fullmatch(r"JPEGImages/[^/]+", path) and _is_image(path) for path in paths)
    beside = [name for name in ("Annotations", "SegmentationClass", "ImageSets") if _any_below(paths, name)]
    if not images or not beside:
        return None
    return Look("voc", f"VOC (JPEGImages/ with {', '.join(f'{name}/' for name in beside)})", "", "JPEGImages")


def _coco(paths: Sequence[str]) -> Look | None:
    jsons = {kind: [path for path in paths if name.fullmatch(path)] for kind, name in JSONS.items()}
    if not any(_is_image(path) for path in paths) or not any(jsons.values()):
        return None
    kind = "instances" if jsons["instances"] else "panoptic"
    settings = "" if kind == "instances" else "masks_from: panoptic"
    mixed = any(_MASKS_OF_COCO.match(path) for path in paths)
    return Look("coco", f"COCO ({jsons[kind][0]})", settings, mixed=mixed)


def _parquet(paths: Sequence[str]) -> Look | None:
    tables = [path for path in paths if path.endswith(".parquet")]
    return None if not tables or any(map(_is_image, paths)) else Look("parquet", f"Parquet ({tables[0]})", "")


def _masks(paths: Sequence[str]) -> Look | None:
    """A folder with a name for images beside one with a name for masks, and in that only PNGs of the same names."""
    images: dict[str, list[str]] = {}
    masks: dict[str, list[str]] = {}
    for path in paths:
        if not _is_image(path):
            continue
        parts = path.split("/")
        at = 1 if len(parts) > 2 and parts[0].lower() in SPLITS else 0
        if len(parts) > at + 1 and parts[at].lower() in _IMAGE_FOLDERS:
            images.setdefault(parts[at], []).append(path)
        elif len(parts) > at + 1 and parts[at].lower() in _MASK_FOLDERS:
            masks.setdefault(parts[at], []).append(path)
    for mask_folder, of_masks in sorted(masks.items()):
        if not all(path.lower().endswith(_MASK_SUFFIXES) for path in of_masks):
            continue
        for image_folder, of_images in sorted(images.items()):
            names = {name for path in of_images for name in _names(path)}
            some = of_masks[:: -(-len(of_masks) // _SAMPLE)]
            if sum(bool(names & _names(path)) for path in some) * 2 >= len(some):
                return _pair(image_folder, mask_folder, of_images[:: -(-len(of_images) // _SAMPLE)], some)
    return None


def _pair(image_folder: str, mask_folder: str, images: Sequence[str], masks: Sequence[str]) -> Look:
    shared = _common(images, image_folder).split("/")[1:]  # folders that both have need no word
    deep = _common(masks, mask_folder).removesuffix("/".join(["", *shared])) if shared else _common(masks, mask_folder)
    named = [("image_folder", image_folder, "images"), ("mask_folder", deep, "masks")]
    settings = [f"{key}: {value}" for key, value, default in named if value != default]
    if image_folder == "leftImg8bit":  # Cityscapes
        settings += ["image_suffix: _leftImg8bit", "mask_suffix: _gtFine_labelIds", "label_map: cityscapes19"]
    words = f"image + mask folders ({image_folder}/, {deep}/)"
    return Look("masks", words, ", ".join(settings), image_folder if masks[0].startswith(mask_folder) else "")


def _common(paths: Sequence[str], folder: str) -> str:
    """The deepest folder, from `folder` on, in which all of these lie; it ends before a split's folder."""
    inner = [path.split("/")[path.split("/").index(folder) : -1] for path in paths]
    parts = posixpath.commonpath(["/".join(folders) for folders in inner]).split("/")
    end = next((at for at, part in enumerate(parts) if at and split_of(part)), len(parts))
    return "/".join(parts[:end])


def _names(path: str) -> set[str]:
    """A file's name without its ending, and without the last one or two words that a suffix may have added."""
    name = posixpath.splitext(posixpath.basename(path))[0]
    words = name.split("_")
    return {name, *("_".join(words[:-cut]) for cut in (1, 2) if len(words) > cut)}


def _is_image(path: str) -> bool:
    return path.lower().endswith(SUFFIXES)


def _any_below(paths: Sequence[str], folder: str) -> bool:
    return any(path.startswith(f"{folder}/") for path in paths)


def _without_split(path: str) -> str:
    top, _, inner = path.partition("/")
    return inner if inner and top.lower() in SPLITS else path


def _after_split(path: str, folders: tuple[str, ...]) -> str:
    """A path from its image or mask folder on, where a split's folder stands before that one."""
    top, _, inner = path.partition("/")
    return inner if top.lower() in SPLITS and inner.startswith(folders) else path


def _endings(paths: Sequence[str]) -> str:
    counts = Counter(posixpath.splitext(path)[1].lower() or "without an ending" for path in paths)
    return "there are: " + ", ".join(f"{count} {ending}" for ending, count in counts.most_common(_SHOWN))
