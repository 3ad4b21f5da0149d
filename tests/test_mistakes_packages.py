"""Plug-ins that cannot be imported: the message names the package, and there is no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.config import registry
from tests.mistakes.base import Mistake

Install = Callable[[str | None], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """`install(source)` installs a package `cats` whose stage is in a module of that source; None: in no file."""
    folder = tmp_path / "site"
    info = folder / "cats-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cats\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tessera.stages]\ncats = cats_stage:Cats\n")
    monkeypatch.syspath_prepend(folder)

    def install_module(source: str | None) -> None:
        if source is not None:
            (folder / "cats_stage.py").write_text(source)
        registry._entries.cache_clear()

    yield install_module
    registry._entries.cache_clear()
    sys.modules.pop("cats_stage", None)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "No module named 'cats_stage'"),
        ("import dogs_that_nobody_has", "No module named 'dogs_that_nobody_has'"),
        ("class Dogs: ...", "AttributeError: module 'cats_stage' has no attribute 'Cats'"),
        ("class Cats", "SyntaxError: expected ':'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_43_a_plug_in_that_cannot_be_imported(
    source: str | None, reason: str, install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(source)
    mistake = Mistake("43", "broken plug-in", [], replace=[("uses: neighbors", "uses: cats")])
    mistake.make(tmp_path)
    code, shown = mistake.commit(tmp_path)
    assert code == 2
    assert "p.yaml:14: stages.nn.uses: 'cats' (cats_stage:Cats, from cats) cannot be imported: " in shown
    assert reason in shown
    assert "install the package that it needs" in shown
