"""What the terminal shows: numbers in words, and bars where there is a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pipeline.cli.printing import number, result_rows
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
        boxes = shown.begin("boxes", ["new"])
        boxes.progress(1, 10, "images")  # too early for a line
        monkeypatch.setattr(display, "LINE_EVERY", 0.0)
        boxes.progress(5, 10, "images")
        boxes.figures("loss 2.31, lr 1.00e-03, 87 images/s")
        boxes.progress(6, 10, "steps")
        boxes.say("2 [unreadable] images")
        shown.warn("tracking is away")
        boxes.end("done in 1.0 s")
    lines = out.getvalue().splitlines()
    assert lines[0] == "boxes: new"
    assert lines[1].startswith("  boxes: 5 of 10 images, ")
    assert lines[2].startswith("  boxes: 6 of 10 steps, loss 2.31, lr 1.00e-03, 87 images/s, ")
    assert lines[3:] == ["  boxes: 2 [unreadable] images", "warning: tracking is away", "boxes: done in 1.0 s"]


def test_a_terminal_gets_a_bar_for_each_stage_at_work() -> None:
    out = io.StringIO()
    with RunDisplay(Console(file=out, force_terminal=True, width=100)) as shown:
        boxes, superpixels = shown.begin("boxes", ["new"]), shown.begin("superpixels")
        boxes.figures("loss 2.31")
        boxes.progress(4, 10, "images")
        superpixels.progress(1, 52, "images")
        assert shown._progress is not None
        shown._progress.refresh()
        assert len(shown._progress.tasks) == 2
        boxes.end("done in 1.0 s")
        boxes.progress(5, 10, "images")  # a late word
        superpixels.say("superpixels: 1 unreadable")
        assert [task.description for task in shown._progress.tasks] == ["superpixels"]
        superpixels.end("done in 1.1 s")
        shown.watch("reading data", 1, 2, "files")
    assert "4/10" in out.getvalue()
    assert "1/52" in out.getvalue()
    assert "images" in out.getvalue()
    assert "loss 2.31" in out.getvalue()


def test_a_result_stands_in_one_row_beside_that_of_an_untrained_encoder() -> None:
    stage = {
        "name": "linear",
        "metrics": {"miou": 41.234, "loss": 0.5, "miou_random": 12.0, "odd_random": 3.0, "loss_random": 1.25},
        "units": {"miou": "%"},
    }
    assert list(result_rows(stage)) == [
        ("linear", "miou", "41.23 %", "12 %", "+29.23 points"),
        ("linear", "loss", "0.5000", "1.2500", "-0.7500"),
        ("linear", "odd_random", "3", "", ""),
    ]
    assert list(result_rows({"name": "photos"})) == []
