"""What all tests share: how they are spread over processes, the development images where they exist, tiny images."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

# Test processes share the cores, and tensors this small gain nothing from threads. Read when numpy and torch load.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray
from PIL import Image
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# A busy machine makes an example slow, not wrong.
settings.register_profile("tessera", deadline=None)
settings.load_profile("tessera")

ROOT = Path(__file__).resolve().parent.parent


class RayTogether(LoadScopeScheduling):
    """Hands the tests to the processes one by one, but those of the files on Ray all to one process, and first.

    A second Ray beside the first would take its CPUs and 2 GiB more.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "ray" if is_on_ray(nodeid) else nodeid


def is_on_ray(nodeid: str) -> bool:
    """Whether a test's file asks for the fixture `ray_local` or has the mark `ray`: xdist knows tests by name only."""
    return _mentions_ray(nodeid.split("::")[0])


@cache
def _mentions_ray(file: str) -> bool:
    return re.search(r"\bray_local\b|\bmark\.ray\b", (ROOT / file).read_text()) is not None


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> RayTogether:
    """xdist asks for the order of tests here."""
    return RayTogether(config, log)


@pytest.fixture(scope="session")
def dev_data() -> Path:
    """The folder of development images (scenes, objects, boxes, video); the test is skipped where it is missing."""
    folder = ROOT / "data"
    missing = [name for name in ("objects", "scenes", "boxes", "video") if not (folder / name).is_dir()]
    if missing:
        pytest.skip(f"needs data/{', data/'.join(missing)}: configs/prepare_data.py makes them")
    return folder


@pytest.fixture(scope="session")
def quickstart_data() -> Path:
    """The photographs committed with the project: 22 train, 30 val, with COCO json files."""
    return ROOT / "configs" / "quickstart"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Node-local copies and records that wait go to pytest's own folder, never to the user's."""
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("TESSERA_STATE", str(tmp_path_factory.getbasetemp() / "state"))


def smooth_pixels(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    """(height, width, 3) RGB that varies slowly, so that JPEG keeps it within a few grey levels."""
    y, x = np.mgrid[0:height, 0:width]
    phase = np.random.default_rng(seed).uniform(0, 6.28, 3)
    waves = [127 + 100 * np.sin(x * (c + 1) / width * 3 + y / height * 2 + phase[c]) for c in range(3)]
    return np.stack(waves, axis=2).clip(0, 255).astype(np.uint8)


def encode(pixels: NDArray[np.uint8] | Image.Image, format: str = "JPEG", **options: object) -> bytes:
    """Bytes of an image file, through PIL (an encoder other than the one under test)."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture
def make_image() -> Callable[..., Path]:
    """`make_image(path, width=32, height=24, seed=0)` writes a small JPEG, PNG, WebP or BMP after the path's ending."""

    def make(path: Path, width: int = 32, height: int = 24, seed: int = 0) -> Path:
        formats = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(smooth_pixels(width, height, seed), formats[path.suffix.lower()]))
        return path

    return make


@pytest.fixture
def make_mask() -> Callable[..., Path]:
    """`make_mask(path, values)` writes an (H, W) integer array as a PNG of one channel."""

    def make(path: Path, values: NDArray[np.uint8]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(Image.fromarray(values), "PNG"))
        return path

    return make
