"""What a user should know of a source that could be read: sentences for the terminal and the manifest.

A problem concerns one image, object or split and is named; a remark says what was done about many of them.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Collection, Sequence

from pipeline.errors import SourceError
from stages.ingest.files import Files
from stages.ingest.layout import Item, Vocabulary
from stages.ingest.recognise import split_of
from stages.ingest.rows import OUTSIDE
from stages.ingest.settings import IngestConfig
from stages.ingest.write import Shards

_FIRST = 3  # names in a sentence
_FROM = 1000  # class values this large, with gaps, are ids that nobody meant as classes
_WHY = {  # layout -> why an image in a folder called val is not of split val
    "coco": ("the json that lists them is another split's", "name one json a split with `annotations`"),
    "voc": ("ImageSets decides", "set image_set"),
    "davis": ("ImageSets decides", "set image_set"),
}
_SPLITS = ("not all folders beside those are called after a split", "name the splits' folders with `splits`")
LABEL_MAP = "a label map gives values their classes: label_map: {7: road, 8: sidewalk}, a file, or cityscapes19"


def summary(config: IngestConfig, shards: Shards, vocabulary: Vocabulary) -> str:
    """What was read, in one line: images by split, and the classes of labels and masks."""
    splits = ", ".join(f"{name} {split.images}" for name, split in sorted(shards.splits.items()))
    parts = [f"read as layout {config.layout}: images by split: {splits}"]
    if shards.labels:
        parts.append(f"{len(shards.labels)} classes of labels ({_some(sorted(shards.labels))})")
    if shards.mask_values:
        names = _class_names(shards.mask_values, vocabulary)
        parts.append(f"{len(names)} classes in masks ({_some(names)})")
    return "; ".join(parts)


def of_listing(config: IngestConfig, items: Sequence[Item], files: Files) -> list[str]:
    """What the listing shows: folders named after splits that are none, links out of the source."""
    found = []
    other: Counter[tuple[str, str]] = Counter()
    for item in items if config.splits is None and config.layout != "parquet" else ():
        folders = [folder for folder in posixpath.dirname(item.key).split("/") if split_of(folder)]
        if folders and item.split not in {split_of(folder) for folder in folders}:
            other[folders[0], item.split] += 1
    for (folder, split), count in sorted(other.items()):
        why, remedy = _WHY.get(config.layout, _SPLITS)
        found.append(f"{_images(count)} in a folder {folder} count as split {split}: {why} ({remedy})")
    if files.links_out:
        link, target = min(files.links_out.items())
        count = len(files.links_out)
        found.append(f"{count} link{'s' * (count > 1)} out of the source, read as part of it: {link} -> {target}")
    return found


def misnamed(files: Files) -> list[dict[str, str]]:
    """A problem for each file whose name is not UTF-8."""
    return [{"key": name, "reason": "its name is not UTF-8: rename it"} for name in sorted(files.not_utf8)]


def of_masks(shards: Shards, vocabulary: Vocabulary) -> list[str]:
    """The splits whose masks hold one class alone: any score on them is empty."""
    found = []
    for name, split in sorted(shards.splits.items()):
        if split.masks and len(split.mask_values) <= 1:
            one = "".join(_class_names(split.mask_values, vocabulary, values=True))
            hold = "holds" if split.masks == 1 else "hold"
            what = f"{hold} one class only, {one}" if one else f"{hold} no class, all is ignored"
            count = "the only mask" if split.masks == 1 else f"all {split.masks} masks"
            found.append(f"{count} of split {name} {what}: evaluations refuse them, as every encoder would score alike")
    return found


def of_rows(config: IngestConfig, shards: Shards, vocabulary: Vocabulary) -> list[str]:
    """What the images themselves show."""
    found = ["the source has one image only"] if shards.images == 1 else []
    for words, keys in sorted(shards.converted.items()):
        found.append(f"{_images(len(keys))} kept as found, and read with a loss: {words} ({_some(keys)})")
    if shards.unlisted:
        values = _some([str(value) for value in sorted(shards.unlisted)], 12)
        found.append(f"mask values that label_map does not list count for nothing: {values}")
    values_found = shards.mask_values
    if vocabulary.mask_classes is None and values_found and config.layout != "davis":  # there they number objects
        top = max(values_found)
        if top >= _FROM and len(values_found) * 2 < top:
            raise SourceError(
                f"source {config.source}: its masks hold {len(values_found)} values up to {top}, without names: they "
                f"look like ids, not classes ({LABEL_MAP})"
            )
        found.append(
            f"nothing names the classes of the masks: values 0 to {top} are the classes, {len(values_found)} of them "
            f"occur (name them with classes.json or `classes`; {LABEL_MAP})"
        )
    return found + _of_labels(config, shards)


def _of_labels(config: IngestConfig, shards: Shards) -> list[str]:
    labels = shards.labels
    if len(labels) == 1 and shards.images > 1:
        (name,) = labels
        deeper = f" (are the classes one folder deeper? source: {config.source}/{name})"
        return [f"all labels are {name!r}{deeper if config.layout == 'folder' else ''}"]
    single = sorted(name for name, count in labels.items() if count == 1)
    if single and len(labels) > 1:
        what = "class has" if len(single) == 1 else "classes have"
        return [f"{len(single)} {what} one image only, which no k-NN can find by another: {_some(single)}"]
    return []


def all_skipped(config: IngestConfig, listed: int, problems: Sequence[dict[str, str]], written_to: str) -> str:
    """The sentence that ends a source without a usable image.

    Args:
        config: of the stage.
        listed: how many candidates there were.
        problems: what was wrong with them.
        written_to: the file that holds all of them.
    """
    place = f"source {config.source} has no usable image (layout {config.layout}, {listed} listed)"
    if not problems:
        return f"{place}: no file that ends like an image where the layout expects one (is the layout right?)"
    first = "; ".join(f"{problem['key']}: {problem['reason']}" for problem in problems[:_FIRST])
    remedy = f" ({hint})" if (hint := remedy_for(problems)) else ""
    return f"{place}. The first of {len(problems)} problems: {first}. All of them: {written_to}{remedy}"


def remedy_for(problems: Sequence[dict[str, str]]) -> str | None:
    """What helps against most of these problems; None where nothing general does."""
    reasons = [problem["reason"] for problem in problems]
    if any(f", {OUTSIDE} the" in reason for reason in reasons):
        return LABEL_MAP
    if reasons and sum(reason.startswith("no mask ") for reason in reasons) * 2 > len(reasons):
        return "do the masks' names differ? image_suffix and mask_suffix say by which ends"
    return None


def _class_names(present: Collection[int], vocabulary: Vocabulary, *, values: bool = False) -> list[str]:
    names = vocabulary.mask_classes
    if names is None:
        return [str(value) for value in sorted(present)]
    return [f"{names[value]} (value {value})" if values else names[value] for value in sorted(present)]


def _images(count: int) -> str:
    return f"{count} image{'s' * (count != 1)}"


def _some(names: Sequence[str], most: int = _FIRST) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
