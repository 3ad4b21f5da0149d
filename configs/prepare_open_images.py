"""Builds OpenImage-MINI, the set that D3SSL trains on beside COCO (its section 5.1), from Open Images' files.

Download Open Images' table of boxes and the names of its classes, and COCO's annotations, then:

    python configs/prepare_open_images.py --open-images data/open_images \\
        --coco data/coco/annotations/instances_train2017.json

--open-images is a folder with *class-descriptions-boxable.csv and *train-annotations-bbox.csv, as they are at
https://storage.googleapis.com/openimages/web/download_v7.html (2.3 GB; the script takes a few GB of memory). This
writes data/openimage_mini/images.txt, lines `train/<image>`, which Open Images' own downloader.py reads:

    python downloader.py data/openimage_mini/images.txt --download_folder=data/open_images/photographs
    python configs/prepare_open_images.py ... --photographs data/open_images/photographs

The second call copies these photographs to data/openimage_mini/train; configs/d3ssl/coco.yaml reads them with `source:
data/openimage_mini`, `layout: folder`. Boxes: CC BY 4.0; photographs: CC BY 2.0 each, as their authors state.

What the paper says: every image has an object of a class of COCO, and of each class that both sets have, there are not
more objects than in COCO's train2017; about 146,000 images result. Chosen here, because it does not say: images are
asked in a random order (--seed) and taken while all classes of theirs have room, until there are 146,000 (--count);
which classes are the same (SAME_CLASSES, else those of the same name); a box around a group counts as one object. So
the set is one of the same rule, not the authors' own.

Exit status: 0, the set, or the list of it, is complete; 1, photographs are missing, they are named; 2, a file cannot
be read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv

COUNT = 146_000  # images of the paper's set
PAPER = "paper: 146,000 images, 9.1 objects and 3.20 classes an image, 569 classes"
# COCO's class -> classes of Open Images, where not the one class of the same name is meant.
SAME_CLASSES = {
    "person": ("Person", "Man", "Woman", "Boy", "Girl"),
    "cow": ("Cattle", "Bull"),
    "bear": ("Bear", "Brown bear", "Polar bear"),
    "frisbee": ("Flying disc",),
    "skis": ("Ski",),
    "sports ball": ("Ball", "Football", "Tennis ball", "Volleyball (Ball)", "Rugby ball", "Cricket ball", "Golf ball"),
    "cup": ("Coffee cup", "Mug"),
    "knife": ("Knife", "Kitchen knife"),
    "sandwich": ("Sandwich", "Submarine sandwich"),
    "donut": ("Doughnut",),
    "couch": ("Couch", "Studio couch", "Sofa bed", "Loveseat"),
    "potted plant": ("Houseplant",),
    "dining table": ("Kitchen & dining room table",),
    "tv": ("Television",),
    "mouse": ("Computer mouse",),
    "remote": ("Remote control",),
    "keyboard": ("Computer keyboard",),
    "cell phone": ("Mobile phone",),
    "microwave": ("Microwave oven",),
    "clock": ("Clock", "Alarm clock", "Digital clock", "Wall clock"),
    "hair drier": ("Hair dryer",),
}


class DataError(Exception):
    """A file that cannot be used; the message says which, and what to do."""


@dataclass(frozen=True)
class Selection:
    """The images of the set, in the order of their names, and what is known of their objects."""

    images: list[str]
    objects: int
    classes: int
    classes_an_image: float


# --- reading ----------------------------------------------------------------------------------------------------------


def find(folder: Path, ending: str) -> Path:
    """The file of a folder whose name ends like this; releases put a version in front.

    Raises:
        DataError: There is none, or several.
    """
    found = sorted(folder.glob(f"*{ending}"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise DataError(f"{folder} must have one file *{ending}, and has {names}: see --help")
    return found[0]


def read_names(path: Path) -> dict[str, str]:
    """Label -> name of the class, in lower case; a first line of titles is passed over."""
    rows = (line.split(",", 1) for line in path.read_text(encoding="utf-8").splitlines() if "," in line)
    names = {label: name.strip().strip('"').lower() for label, name in rows if label.startswith("/")}
    if not names:
        raise DataError(f"{path} has no lines `/m/...,Name`: it is not Open Images' list of classes")
    return names


def read_boxes(path: Path) -> dict[str, dict[str, int]]:
    """Image -> label -> its number of boxes.

    Raises:
        DataError: It is no table with the columns ImageID and LabelName.
    """
    columns = ["ImageID", "LabelName"]
    kinds = dict.fromkeys(columns, pa.dictionary(pa.int32(), pa.string()))
    try:
        options = pyarrow.csv.ConvertOptions(include_columns=columns, column_types=kinds)
        table = pyarrow.csv.read_csv(path, convert_options=options).unify_dictionaries()
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
        raise DataError(f"{path} is not Open Images' table of boxes (columns ImageID, LabelName): {error}") from error
    counted = table.group_by(columns).aggregate([([], "count_all")])
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for batch in counted.to_batches(max_chunksize=100_000):
        parts = [batch.column(name).to_pylist() for name in (*columns, "count_all")]
        for image, label, count in zip(*parts, strict=True):
            found[image][sys.intern(label)] = count
    return dict(found)


def read_limits(path: Path) -> dict[str, int]:
    """COCO's class -> its number of objects.

    Raises:
        DataError: It is no json of COCO's objects.
    """
    try:
        content = json.loads(path.read_bytes())
        names = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
        counts = Counter(names[entry["category_id"]] for entry in content["annotations"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path} is not COCO's instances_train2017.json: {error!r}") from error
    return {name: counts[name] for name in names.values()}


# --- choosing ---------------------------------------------------------------------------------------------------------


def shared_classes(names: Mapping[str, str], limits: Iterable[str]) -> dict[str, str]:
    """Open Images' label -> COCO's class, for the classes that both have."""
    wanted = {other.lower(): name for name in limits for other in SAME_CLASSES.get(name, (name,))}
    return {label: wanted[name] for label, name in names.items() if name in wanted}


def choose(
    boxes: Mapping[str, Mapping[str, int]],
    shared: Mapping[str, str],
    limits: Mapping[str, int],
    *,
    count: int,
    seed: int,
) -> Selection:
    """Takes images in a random order while all shared classes of theirs have room.

    Args:
        boxes: image -> label -> number of boxes.
        shared: label -> COCO's class.
        limits: COCO's class -> most objects.
        count: of images at most.
        seed: of the order, which does not depend on that of the table.
    """
    room, taken = Counter(limits), list[str]()
    for image in sorted(boxes, key=lambda image: hashlib.sha256(f"{seed} {image}".encode()).digest()):
        if len(taken) == count:
            break
        needed: Counter[str] = Counter()
        for label, number in boxes[image].items():
            if label in shared:
                needed[shared[label]] += number
        if needed and all(number <= room[name] for name, number in needed.items()):
            room -= needed
            taken.append(image)
    labels = [set(boxes[image]) for image in taken]
    return Selection(
        sorted(taken),
        sum(sum(boxes[image].values()) for image in taken),
        len(set().union(*labels)),
        sum(map(len, labels)) / max(len(taken), 1),
    )


# --- the whole --------------------------------------------------------------------------------------------------------


def copy_photographs(images: Iterable[str], source: Path, to: Path) -> list[str]:
    """Copies `<image>.jpg` from anywhere below a folder; those that are there already are kept.

    Returns:
        The images that were not found.
    """
    there = {path.stem: path for path in source.rglob("*.jpg")}
    to.mkdir(parents=True, exist_ok=True)
    missing = []
    for image in images:
        target = to / f"{image}.jpg"
        if target.is_file():
            continue
        if image not in there:
            missing.append(image)
            continue
        unfinished = target.with_suffix(".part")  # an interrupted run leaves no half of a file under its name
        shutil.copyfile(there[image], unfinished)
        unfinished.replace(target)
    return missing


def prepare(options: argparse.Namespace, say: Callable[[str], None] = print) -> int:
    """Writes the list and, with --photographs, the set; how many photographs are missing.

    Raises:
        DataError: A file cannot be used, or no image fits.
    """
    names = read_names(find(options.open_images, "class-descriptions-boxable.csv"))
    limits = read_limits(options.coco)
    shared = shared_classes(names, limits)
    if without := sorted(set(limits) - set(shared.values())):
        say(f"classes of COCO that Open Images does not have: {', '.join(without)}")
    boxes = read_boxes(find(options.open_images, "train-annotations-bbox.csv"))
    chosen = choose(boxes, shared, limits, count=options.count, seed=options.seed)
    if not chosen.images:
        raise DataError(f"none of {len(boxes)} images has an object of a class of COCO: is it the table of train?")
    options.to.mkdir(parents=True, exist_ok=True)
    (options.to / "images.txt").write_text("".join(f"train/{image}\n" for image in chosen.images))
    objects = chosen.objects / len(chosen.images)
    say(
        f"{options.to / 'images.txt'}: {len(chosen.images):,} images, {objects:.1f} objects and "
        f"{chosen.classes_an_image:.2f} classes an image, {chosen.classes} classes ({PAPER})"
    )
    if options.photographs is None:
        say("download these with Open Images' downloader.py, then name the folder with --photographs (see --help)")
        return 0
    if not options.photographs.is_dir():
        raise DataError(f"--photographs {options.photographs} is no folder")
    missing = copy_photographs(chosen.images, options.photographs, options.to / "train")
    if missing:
        more = f", and {len(missing) - 10} more" if len(missing) > 10 else ""
        say(f"{options.photographs} lacks {len(missing)} photographs: {', '.join(missing[:10])}{more}")
    else:
        say(f"{options.to / 'train'}: complete")
    return len(missing)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--open-images", type=Path, required=True, help="folder of Open Images' two csv files")
    parser.add_argument("--coco", type=Path, required=True, help="COCO's instances_train2017.json")
    parser.add_argument("--photographs", type=Path, help="folder of the downloaded photographs, <image>.jpg")
    parser.add_argument("--to", type=Path, default=Path("data/openimage_mini"), help="folder to build")
    parser.add_argument("--count", type=int, default=COUNT, help=f"images at most; default: {COUNT}")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which images are asked")
    options = parser.parse_args(arguments)
    try:
        return int(prepare(options) > 0)
    except (DataError, OSError) as error:
        print(f"prepare_open_images: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
