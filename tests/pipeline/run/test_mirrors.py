"""TensorBoard and Weights & Biases get what MLflow gets; a mirror that is away costs a warning and no result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.run import mirrors
from tests.pipeline.workshop import PIPELINE, Workshop

WANTED = "mirrors: {{tensorboard: boards, wandb: my-project}}\n"


def mirrored(workshop: Workshop, line: str) -> None:
    workshop.write(line + PIPELINE.lstrip())


class FakePage:
    """Keeps what it is given; where `broken`, its second row fails."""

    made: list[FakePage] = []
    broken = False

    def __init__(self, target: str, group: str, name: str, settings: Mapping[str, Any]) -> None:
        self.told: list[Any] = [target, name, dict(settings)]
        self.rows: list[tuple[dict[str, float], int]] = []
        FakePage.made.append(self)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        if self.broken and self.rows:
            raise ConnectionError("the mirror's server is away")
        self.rows.append((dict(metrics), step))

    def log_results(self, metrics: Mapping[str, float], picture: bytes | None) -> None:
        self.told.append((dict(metrics), picture is not None))

    def finish(self, ok: bool) -> None:
        self.told.append(ok)


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> list[FakePage]:
    FakePage.made = []
    monkeypatch.setattr(mirrors, "PAGES", {"tensorboard": FakePage, "wandb": FakePage})
    monkeypatch.setattr(mirrors.importlib.util, "find_spec", lambda name: name)
    return FakePage.made


def test_every_stage_has_a_page_with_settings_rows_results_and_its_end(
    workshop: Workshop, pages: list[FakePage]
) -> None:
    mirrored(workshop, "mirrors: {{tensorboard: boards}}\n")
    workshop.tessera("run", "p.yaml", "--set", "stages.encoder.width=-4")
    numbers, scaled, encoder, score, results = pages
    assert numbers.told[:2] == ["boards", "numbers"]
    assert scaled.rows == [({"loss/term": 2.0}, 0), ({"loss/term": 4.0}, 1), ({"loss/term": 6.0}, 2)]
    assert encoder.told[2]["width"] == -4
    assert encoder.told[3:] == [({}, True), True]
    assert score.told[3:] == [({"bytes": 3.0}, False), True]
    assert results.told == ["boards", "results", {}, ({"score.bytes": 3.0}, False), True]
    pages.clear()
    workshop.tessera("run", "p.yaml", "--set", "stages.encoder.width=-4")
    assert pages == []  # all is cached


def test_a_failed_stage_ends_its_page_as_failed(workshop: Workshop, pages: list[FakePage]) -> None:
    mirrored(workshop, "mirrors: {{wandb: my-project}}\n")
    workshop.tessera("run", "p.yaml", "--set", "stages.scaled.fail=purpose", code=1)
    assert [(page.told[1], page.told[-1]) for page in pages] == [("numbers", True), ("scaled", False)]


def test_a_mirror_that_is_away_costs_one_warning_and_no_result(
    workshop: Workshop, pages: list[FakePage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakePage, "broken", True)
    mirrored(workshop, WANTED)
    shown = workshop.tessera("run", "p.yaml")
    assert shown.stderr.count("warning: mirror tensorboard is away (ConnectionError: the mirror's server is away)") == 1
    assert shown.stderr.count("warning:") == 2
    assert len(workshop.json("artifacts", "ls", "p.yaml")) == 4
    assert len(pages) == 4  # of two stages in two mirrors: none is opened after the failure


def test_a_mirror_whose_package_is_missing_is_refused_before_anything_runs(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirrors.importlib.util, "find_spec", lambda name: None)
    mirrored(workshop, "mirrors: {{tensorboard: boards}}\n")
    shown = workshop.tessera("run", "p.yaml", code=2).stderr
    assert "mirrors.tensorboard: the package tensorboard is not installed" in shown
    assert "tessera[tensorboard]" in shown
    assert workshop.ran == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("mirrors: tensorboard", "p.yaml:1: mirrors: must be a mapping, got 'tensorboard'"),
        ("mirrors: {{tensorbord: x}}", "p.yaml:1: mirrors.tensorbord: unknown mirror 'tensorbord'"),
        ("mirrors: {{wandb: 3}}", "p.yaml:1: mirrors.wandb: must be a folder or a project, got 3"),
    ],
)
def test_a_wrong_mirror_is_a_wrong_config(workshop: Workshop, line: str, message: str) -> None:
    mirrored(workshop, f"{line}\n")
    assert message in workshop.tessera("plan", "p.yaml", code=2).stderr


def test_the_real_tensorboard_reads_what_was_written(workshop: Workshop) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    mirrored(workshop, "mirrors: {{tensorboard: boards}}\n")
    workshop.tessera("run", "p.yaml")
    folders = {path.name: path for path in workshop.folder.glob("boards/p-*/*")}
    assert folders.keys() == {"numbers", "scaled", "encoder", "score", "results"}

    def events(stage: str) -> Any:
        return accumulator.EventAccumulator(str(folders[stage])).Reload()

    assert [(e.step, e.value) for e in events("scaled").Scalars("loss/term")] == [(0, 2.0), (1, 4.0), (2, 6.0)]
    assert [e.value for e in events("score").Scalars("result/bytes")] == [3.0]
    assert [(image.width, image.height) for image in events("encoder").Images("preview")] == [(1, 1)]
    (settings,) = events("encoder").Tensors("settings/text_summary")
    assert json.loads(settings.tensor_proto.string_val[0])["width"] == 3


def test_weights_and_biases_keeps_runs_offline(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    mirrored(workshop, "mirrors: {{wandb: my-project}}\n")
    shown = workshop.outside("run", "p.yaml")  # another process: wandb starts a service of its own
    assert "warning" not in shown.stderr
    kept = sorted(Path(workshop.folder, ".tessera", "wandb").glob("offline-run-*/*.wandb"))
    assert len(kept) == 5  # four stages, and the results
    assert any(b"loss/term" in file.read_bytes() for file in kept)
