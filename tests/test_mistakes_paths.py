"""Paths as users write them: with spaces and more than ASCII letters, from their home, relative, in another folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.mistakes.base import Mistake

HOME = "home of zoë 猫"


@pytest.mark.parametrize("source", [f"'{HOME}/photos'", "~/photos", "$HOME/photos", "'${HOME}/photos'"])
def test_41_a_source_is_found_as_it_is_written(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def move(folder: Path) -> None:
        (folder / HOME).mkdir()
        (folder / "photos").rename(folder / HOME / "photos")

    written = Mistake("41", source, [], replace=[("source: photos", f"source: {source}")], prepare=move)
    written.make(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / HOME))
    code, shown = written.commit(tmp_path)
    assert (code, "4 to run, 0 cached" in shown) == (0, True), shown


def test_41_a_store_in_the_home_and_a_file_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / HOME).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / HOME))
    away = tmp_path / "somewhere else"
    replace = [("store: store", "store: ~/store"), ("source: photos", "source: $HOME/photos")]
    written = Mistake("41", "home", [], replace=replace, command=("plan", str(away / "p.yaml"), "--json"))
    written.make(away)
    (away / "photos").rename(tmp_path / HOME / "photos")
    code, shown = written.commit(tmp_path)
    assert code == 0, shown
    assert json.loads(shown)["pipeline"] == "p"
    assert (tmp_path / HOME / "store").is_dir()
    assert not (tmp_path / "~").exists()


def test_41_a_relative_path_is_of_the_working_folder_and_the_message_says_so(tmp_path: Path) -> None:
    away = tmp_path / "somewhere else"
    written = Mistake("41", "from another folder", [], command=("plan", str(away / "p.yaml")))
    written.make(away)
    code, shown = written.commit(tmp_path)
    assert code == 2
    assert f"nothing is at photos (looked in {os.path.realpath(tmp_path)})" in shown
