"""Fixtures for tests of configs and plans: the fake stage types, registered, and pipeline files that a test writes."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.config import registry
from pipeline.config.load import Pipeline, load_pipeline
from tests.pipeline import fake_stages

PIPELINE = """\
store: somewhere
stages:
  scenes:
    uses: ingest
    source: scenes
  slic:
    uses: superpixels
    images: scenes
    region_size: 20
  warmup:
    uses: pretrain
    images: scenes
    method: {name: plain}
  embeddings:
    uses: embeddings
    images: scenes
    encoder: warmup
  near:
    uses: neighbors
    embeddings: embeddings
  cotap:
    uses: pretrain
    images: [{from: scenes, weight: 2}]
    init: warmup
    method:
      name: near
      neighbors: near
      weights: {patch: 1.0}
"""


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The fake stage types take the place of the installed ones."""
    registry._entries.cache_clear()
    monkeypatch.setattr(registry, "entry_points", fake_stages.entry_points)
    yield
    registry._entries.cache_clear()


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`write(text, "name.yaml")` writes a pipeline file into the working folder, which is the test's own."""
    monkeypatch.chdir(tmp_path)

    def write_file(text: str = PIPELINE, name: str = "p.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return Path(name)

    return write_file


@pytest.fixture
def load(registered: None, write: Callable[..., Path]) -> Callable[..., Pipeline]:
    """`load(text, *overrides)` writes a pipeline file and loads it."""
    return lambda text=PIPELINE, *overrides: load_pipeline(write(text), overrides)


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """The folder that PIPELINE's source names, with two files in it."""
    folder = tmp_path / "scenes"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.jpg").write_bytes(b"first")
    (folder / "sub" / "b.jpg").write_bytes(b"second")
    return folder
