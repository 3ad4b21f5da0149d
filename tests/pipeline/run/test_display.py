"""What the terminal shows: numbers in words, and bars where there is a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pipeline.cli.printing import number
from pipeline.run import display
from pipeline.run.display import RunDisplay, duration, size


def test_numbers_in_words() -> None:
    assert [duration(s) for s in (0.04, 3.21, 65, 3599.7, 7620)] == [
        "0.0 s",
        "3.2 s",
        "1 min 05 s",
        "1 h 00 min",
        "2 h 07 min",
    ]
    assert [size(n) for n in (0, 512, 3482, 5 << 30, 3 << 50)] == ["0 B", "512 B", "3.4 KiB", "5.0 GiB", "3072.0 TiB"]
    assert [number(v) for v in (0.123456, 3.0, 52)] == ["0.1235", "3", "52"]


def test_without_a_terminal_progress_comes_in_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    with RunDisplay(Console(file=out)) as shown:
        shown.begin("boxes", ["new"])
        shown.progress(1, 10, "images")  # too early for a line
        monkeypatch.setattr(display, "LINE_EVERY", 0.0)
        shown.progress(5, 10, "images")
        shown.say("2 [unreadable] images")
        shown.warn("tracking is away")
        shown.end("done in 1.0 s")
    lines = out.getvalue().splitlines()
    assert lines[0] == "boxes: new"
    assert lines[1].startswith("  boxes: 5 of 10 images, ")
    assert lines[2:] == ["  boxes: 2 [unreadable] images", "warning: tracking is away", "boxes: done in 1.0 s"]


def test_a_terminal_gets_a_bar() -> None:
    out = io.StringIO()
    with RunDisplay(Console(file=out, force_terminal=True, width=100)) as shown:
        shown.begin("boxes", ["new"])
        shown.progress(4, 10, "images")
        assert shown._progress is not None
        shown._progress.refresh()
        shown.end("done in 1.0 s")
        shown.watch("reading data", 1, 2, "files")
    assert "4/10" in out.getvalue()
    assert "images" in out.getvalue()
