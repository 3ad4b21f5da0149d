"""What an evaluation needs of its images, checked against what `ingest` says of them before any encoder is trained.

Counts and notes of the images are known when the plan is made once they are cached, else the moment they are finished.
Of images that another stage type has made, only what its manifest says is checked. Planning imports this file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pipeline.stage import Feed

Holding = Literal["masks", "labels", "objects"]
Mismatch = tuple[str, str, str]  # field path, what is wrong, what to do

_ONE = {"masks": "a mask", "labels": "a label", "objects": "an object box"}
_REMEDY = {
    "masks": "ingest with a layout that has masks, or with masks_from, or name another images stage",
    "labels": "ingest class folders, or with label: largest_object where there are objects, or name another stage",
    "objects": "ingest with a layout that has boxes (coco, voc), or name another images stage",
}


def lacking(feed: Feed, holding: Holding, splits: Mapping[str, str]) -> Iterator[Mismatch]:
    """What images lack for an evaluation on two splits.

    Args:
        feed: the images.
        holding: what is needed of every split.
        splits: option of the evaluation -> the split that it names.
    """
    counts, by_split = feed.counts or {}, split_counts(feed)
    if counts.get(holding) == 0:
        images = counts.get("images", 0)
        yield (
            "images",
            f"{feed.stage} has no {holding}: none of its {images} images has {_ONE[holding]}",
            _REMEDY[holding],
        )
        return
    there = ", ".join(f"{name}: {split['images']}" for name, split in sorted(by_split.items()))
    for option, name in splits.items() if by_split else ():
        if name not in by_split:
            what = f"{feed.stage} has no image of split {name!r} (images by split: {there})"
            yield option, what, f"name one of these, or say with `splits` of {feed.stage} which folders are which split"
        elif by_split[name].get(holding) == 0:
            others = sorted(other for other, split in by_split.items() if split.get(holding))
            what = f"no image of split {name!r} of {feed.stage} has {_ONE[holding]}"
            yield option, what, f"splits that have: {', '.join(others)}"


def single_class(feed: Feed, splits: Mapping[str, str]) -> Iterator[Mismatch]:
    """Splits whose masks all hold one class: every encoder would get the same score, and mIoU 100.

    Args:
        feed: the images.
        splits: option of the evaluation -> the split that it names.
    """
    names = (feed.notes or {}).get("mask_classes") or []
    for option, name in splits.items():
        split = split_counts(feed).get(name, {})
        values = split.get("mask_values")
        if split.get("masks") and values is not None and len(values) < 2:
            one = f"one class only, {_named(values[0], names)}" if values else "no class: all their pixels are ignored"
            what = f"the masks of split {name!r} of {feed.stage} hold {one}; every encoder would get the same score"
            yield option, what, "look at its preview.png and at the options of its masks; name another split or stage"


def split_counts(feed: Feed) -> dict[str, dict[str, Any]]:
    """What each split holds; from images that say no more, how many images; empty as long as they are not made."""
    notes = feed.notes or {}
    if contents := notes.get("contents"):
        return dict(contents)
    return {name: {"images": count} for name, count in (notes.get("splits") or {}).items()}


def _named(value: int, names: list[str]) -> str:
    return f"{names[value]} (value {value})" if value < len(names) else str(value)
