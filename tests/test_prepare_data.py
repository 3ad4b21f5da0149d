"""`configs/prepare_data.py` on tiny archives of the sources' structure, and its lists against the real data/ folder."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from configs.prepare_data import LISTS, TOLERANCE, DataError, agrees, check_of, main, prepare, read_list
from tests.benchmarks.images import find_images
from tests.conftest import encode, smooth_pixels

TOP = "repository-b850f03"  # the folder that an archive puts around everything
PHOTO, SCENE, MASK = "train/n01/a.JPEG", "CamVid/train/f1.png", "CamVid/trainannot/f1.png"
Files = dict[str, bytes]


@pytest.fixture
def files() -> Files:
    """What a source holds: a photograph to copy, a scene to encode and its mask."""
    mask = np.arange(12, dtype=np.uint8).repeat(40).reshape(20, 24)
    return {
        PHOTO: encode(smooth_pixels(16, 12, 1)),
        SCENE: encode(smooth_pixels(1024, 600, 2), "PNG"),
        MASK: encode(Image.fromarray(mask), "PNG", compress_level=0),
    }


@pytest.fixture
def lists(tmp_path: Path, files: Files) -> Path:
    """The list of these three, with checks that are worked out here and not by the script."""
    photo = hashlib.sha256(files[PHOTO]).hexdigest()[:16]
    mask = Image.open(io.BytesIO(files[MASK]))
    pixels = hashlib.sha256(f"L {mask.size}".encode() + mask.tobytes()).hexdigest()[:16]
    scene = smooth_pixels(1024, 600, 2).reshape(4, 150, 4, 256, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    folder = tmp_path / "lists" / "objects"
    folder.mkdir(parents=True)
    (folder / "files.txt").write_text(
        f"# a comment\n\n[copy] train/n01/*.JPEG -> train/tench/*.jpg\na {photo}\n"
        f"\n[jpeg] train/*.png -> images/train/*.jpg\nf1 512x300:{scene.tobytes().hex()}\n"
        f"\n[mask] trainannot/*.png -> masks/train/*.png\nf1 {pixels}\n"
    )
    (folder / "classes.json").write_text('{"classes": ["tench"]}')
    return folder


def as_folder(path: Path, files: Files) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def as_zip(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path.with_suffix(".zip")


def as_tar(path: Path, files: Files) -> Path:
    with tarfile.open(path.with_suffix(".tar.gz"), "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path.with_suffix(".tar.gz")


def built(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


EVERYTHING = {"train/tench/a.jpg", "images/train/f1.jpg", "masks/train/f1.png", "classes.json"}


@pytest.mark.parametrize("pack", [as_folder, as_zip, as_tar])
def test_builds_the_folder(
    pack: Callable[[Path, Files], Path], tmp_path: Path, lists: Path, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    source = pack(tmp_path / "source", {f"{TOP}/{name}": data for name, data in files.items()} | {f"{TOP}/x.py": b"1"})
    to = tmp_path / "data"
    assert main(["objects", "--source", str(source), "--to", str(to), "--lists", str(lists.parent)]) == 0
    assert "complete" in capsys.readouterr().out
    assert built(to) == EVERYTHING
    assert (to / "train/tench/a.jpg").read_bytes() == files[PHOTO]
    assert (to / "classes.json").read_bytes() == (lists / "classes.json").read_bytes()
    with Image.open(to / "images/train/f1.jpg") as scene:
        assert (scene.format, scene.mode, scene.size) == ("JPEG", "RGB", (512, 300))
        expected = Image.fromarray(smooth_pixels(1024, 600, 2)).resize((512, 300), Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(scene).astype(int) - np.asarray(expected)).mean() < 2
    mask, original = Image.open(to / "masks/train/f1.png"), Image.open(io.BytesIO(files[MASK]))
    assert mask.mode == "L"
    assert mask.tobytes() == original.tobytes()


def test_several_sources_complete_each_other(tmp_path: Path, lists: Path, files: Files) -> None:
    sources = [as_zip(tmp_path / name[-6:-4], {name: data}) for name, data in files.items() if name != MASK]
    sources.append(as_folder(tmp_path / "masks", {MASK.removeprefix("CamVid/"): files[MASK]}))
    assert prepare(lists, sources, tmp_path / "data") == 0
    assert built(tmp_path / "data") == EVERYTHING


def test_a_missing_member_is_named_and_the_rest_is_built(
    tmp_path: Path, lists: Path, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    del files[MASK]
    source = as_tar(tmp_path / "source", files)
    to = tmp_path / "data"
    assert main(["objects", "--source", str(source), "--to", str(to), "--lists", str(lists.parent)]) == 1
    said = capsys.readouterr().out
    assert "1 files were not found" in said
    assert "trainannot/f1.png" in said
    assert "--source" in said
    assert built(to) == EVERYTHING - {"masks/train/f1.png"}


def test_wrong_files_are_named_and_not_written(tmp_path: Path, lists: Path, files: Files) -> None:
    brighter = smooth_pixels(1024, 600, 2)
    brighter[:150, :256] = 255  # one cell of the grid
    wrong = [
        (PHOTO, files[PHOTO] + b"\0"),
        (SCENE, encode(brighter, "PNG")),
        (SCENE, b"not an image"),
        (MASK, encode(Image.new("L", (24, 20)), "PNG")),
        (MASK, files[MASK][:-60]),
    ]
    for i, (name, data) in enumerate(wrong):
        to, said = tmp_path / f"data{i}", list[str]()
        assert prepare(lists, [as_zip(tmp_path / "source", files | {name: data})], to, said.append) == 1
        assert "1 files are not as listed" in said[-1]
        assert f"source.zip: {name}" in said[-1]
        assert len(built(to)) == len(EVERYTHING) - 1


def test_a_second_copy_in_the_source_may_be_the_right_one(tmp_path: Path, lists: Path, files: Files) -> None:
    other = {f"a/{PHOTO}": encode(smooth_pixels(16, 12, 5))}
    assert prepare(lists, [as_zip(tmp_path / "source", other | files)], tmp_path / "data") == 0


def test_an_interrupted_build_continues(tmp_path: Path, lists: Path, files: Files) -> None:
    to, said = tmp_path / "data", list[str]()
    assert prepare(lists, [as_zip(tmp_path / "first", {PHOTO: files[PHOTO]})], to) == 2
    time = (to / "train/tench/a.jpg").stat().st_mtime_ns
    (to / "masks/train").mkdir(parents=True)
    (to / "masks/train/f1.png").write_bytes(files[MASK][:50])  # half of a file
    assert prepare(lists, [as_zip(tmp_path / "rest", {SCENE: files[SCENE], MASK: files[MASK]})], to, said.append) == 0
    assert "1 of 3 files are there already" in said[0]
    assert (to / "train/tench/a.jpg").stat().st_mtime_ns == time
    assert built(to) == EVERYTHING
    said.clear()
    assert prepare(lists, [tmp_path / "deleted.zip"], to, said.append) == 0  # nothing to make: no source is opened
    assert "3 of 3 files are there already" in said[0]


@pytest.mark.parametrize("pack", [as_zip, as_tar])
@pytest.mark.parametrize("prefix", ["../", "/", f"{TOP}/../"])
def test_members_that_leave_the_archive_are_passed_over(
    prefix: str, pack: Callable[[Path, Files], Path], tmp_path: Path, lists: Path, files: Files
) -> None:
    (tmp_path / "in").mkdir()
    source = pack(tmp_path / "in" / "source", {f"{prefix}{name}": data for name, data in files.items()})
    before = built(tmp_path)
    assert prepare(lists, [source], tmp_path / "in" / "data") == 3
    assert built(tmp_path) - before == {"in/data/classes.json"}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("[copy] train/*.jpg -> ../*.jpg\na 00", "leaves its folder"),
        ("[copy] train/*.jpg -> train/*.jpg\n../../a 00", "leaves its folder"),
        ("[copy] /etc/* -> *\na 00", "leaves its folder"),
        ("[link] train/*.jpg -> train/*.jpg\na 00", "neither"),
        ("[copy] train/*.jpg -> train/*.jpg\na", "neither"),
        ("a 00", "neither"),
        ("[copy] train/*.jpg -> train/*.jpg\na 00\na 00", "listed twice"),
    ],
)
def test_a_bad_list_is_refused(line: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "files.txt").write_text(line)
    with pytest.raises(DataError, match=problem):
        read_list(tmp_path / "files.txt")


def test_a_source_that_cannot_be_read_ends_with_status_2(
    tmp_path: Path, lists: Path, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "page.html").write_text("<html>not found</html>")
    whole = as_tar(tmp_path / "source", files).read_bytes()
    (tmp_path / "half.tar.gz").write_bytes(whole[: len(whole) // 2])
    archive = bytearray(as_zip(tmp_path / "source", files).read_bytes())
    archive[200] ^= 255  # inside the first file, whose CRC then fails
    (tmp_path / "flipped.zip").write_bytes(archive)
    for name in ("nowhere.zip", "page.html", "half.tar.gz", "flipped.zip"):
        command = ["objects", "--source", str(tmp_path / name), "--lists", str(lists.parent), "--to"]
        assert main([*command, str(tmp_path / "data" / name)]) == 2
        assert name in capsys.readouterr().err


def test_the_colours_of_an_encoded_image_may_differ_a_little(tmp_path: Path, lists: Path) -> None:
    entry = next(entry for entry in read_list(lists / "files.txt") if entry.action == "jpeg")
    pixels = smooth_pixels(1024, 600, 2).reshape(300, 2, 512, 2, 3).mean(axis=(1, 3))
    for difference, fits in ((0, True), (TOLERANCE - 1, True), (TOLERANCE + 2, False)):
        image = (pixels + difference).clip(0, 255).astype(np.uint8)
        for quality in (85, 95):
            assert agrees(entry, encode(image, quality=quality)) == fits
    assert not agrees(entry, encode(pixels.clip(0, 255).astype(np.uint8)[:, ::-1]))
    assert not agrees(entry, encode(smooth_pixels(1024, 600, 2)))  # of another size


# --- COCO -------------------------------------------------------------------------------------------------------------


def coco(image_id: int, *, crowd: bool = False) -> dict[str, Any]:
    """An `instances` file with one image of 1024 x 768 pixels and one object on its left half, in the top 8 rows."""
    column = [8, 760]  # runs of 1 and 0 down a column, for 512 columns
    counts = [0, *column * 512]
    counts[-1] += 512 * 768
    box = [0, 0, 512, 8]
    area: dict[str, Any] = {"id": image_id * 10, "image_id": image_id, "category_id": 1, "bbox": box, "area": 4096.0}
    shape: Any = {"size": [768, 1024], "counts": counts} if crowd else [[0.0, 0.0, 511.5, 0.0, 512.0, 8.0]]
    facts = {"width": 1024, "height": 768, "license": 4, "flickr_url": "http://flickr/1", "date_captured": "2013"}
    return {
        "licenses": [{"id": 4, "name": "Attribution"}],
        "categories": [{"id": 1, "name": "person"}],
        "images": [facts | {"id": number, "file_name": f"{number:012d}.jpg"} for number in (image_id, image_id + 1)],
        "annotations": [area | {"iscrowd": int(crowd), "segmentation": shape}, area | {"id": 3, "image_id": 999}],
    }


def test_coco_annotations_are_cut_down_and_rescaled(tmp_path: Path) -> None:
    expected = {
        "info": {"description": "COCO 2017 subset (train2017 images), resized to long side <=512"},
        "licenses": [{"id": 4, "name": "Attribution"}],
        "categories": [{"id": 1, "name": "person"}],
        "images": [
            {"id": n, "file_name": f"{n:012d}.jpg", "width": 512, "height": 384}
            | {"license": 4, "flickr_url": "http://flickr/1"}
            for n in (20, 10)
        ],
        "annotations": [
            {"id": n * 10, "image_id": n, "category_id": 1, "iscrowd": crowd, "bbox": [0.0, 0.0, 256.0, 4.0]}
            | {"area": 1024.0, "segmentation": shape}
            for n, crowd, shape in (
                (20, 1, {"size": [384, 512], "counts": [0, *[4, 380] * 255, 4, 380 + 256 * 384]}),
                (10, 0, [[0.0, 0.0, 255.8, 0.0, 256.0, 4.0]]),
            )
        ],
    }
    image = encode(smooth_pixels(1024, 768))
    colours = check_of("jpeg", encode(smooth_pixels(512, 384)))
    content = check_of("coco", json.dumps(expected).encode())
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "files.txt").write_text(
        f"[coco] annotations/instances_*2017.json -> instances_*.json\ntrain {content}\n"
        f"[jpeg] train2017/*.jpg -> images/train/*.jpg\n000000000020 {colours}\n000000000010 {colours}\n"
    )
    images = {f"train2017/{n:012d}.jpg": image for n in (10, 20)}
    parts = [json.dumps(part).encode() for part in (coco(10), coco(20, crowd=True))]
    sources = [
        as_zip(tmp_path / f"s{i}", {"annotations/instances_train2017.json": part} | images)
        for i, part in enumerate(parts)
    ]
    said: list[str] = []
    assert prepare(lists, sources[:1], tmp_path / "data", said.append) == 1  # the annotations of one image only
    assert "name them in one command" in said[-1]
    assert prepare(lists, sources, tmp_path / "data") == 0
    assert json.loads((tmp_path / "data/instances_train.json").read_text()) == expected


# --- the lists of this repository -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [("objects", 3600), ("scenes", 2 * 468), ("boxes", 313 + 2), ("video", 2 * 289)],
)
def test_the_lists_fit_the_development_data(name: str, count: int, dev_data: Path) -> None:
    entries = read_list(LISTS / name / "files.txt")
    assert len(entries) == count
    images = {".jpg", ".png"}
    there = {path.relative_to(dev_data / name).as_posix() for path in (dev_data / name).rglob("*")}
    assert {entry.result for entry in entries if Path(entry.result).suffix in images} == {
        path for path in there if Path(path).suffix in images
    }
    sample = [entry for i, entry in enumerate(entries) if entry.action in ("copy", "coco") or i % 8 == 0]
    assert [entry.result for entry in sample if not agrees(entry, (dev_data / name / entry.result).read_bytes())] == []
    for file in (LISTS / name).rglob("*"):
        if file.is_file() and file.name != "files.txt":
            assert (dev_data / name / file.relative_to(LISTS / name)).read_bytes() == file.read_bytes()


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    script = LISTS.with_suffix(".py")
    done = subprocess.run([sys.executable, script, "objects"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "3600 files were not found" in done.stdout
    assert "train/n02979186/" in done.stdout
    assert "... and 3590 more" in done.stdout
    assert built(tmp_path) == {"data/objects/classes.json"}


def test_a_benchmark_without_its_images_names_the_command(tmp_path: Path, make_image: Callable[..., Path]) -> None:
    with pytest.raises(SystemExit, match=r"^data/boxes has no images .*prepare_data\.py boxes --source"):
        find_images("boxes", "images/train/*.jpg", tmp_path)
    image = make_image(tmp_path / "data/boxes/images/train/a.jpg")
    assert find_images("boxes", "images/train/*.jpg", tmp_path) == [image]
