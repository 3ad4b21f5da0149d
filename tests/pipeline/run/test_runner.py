"""What a run promises: no heavy import when all is cached; whole artifacts after kills, interrupts and damage."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import pytest

from pipeline.config.load import load_pipeline
from pipeline.errors import ArtifactDamaged, SourceError
from pipeline.plan.plan import make_plan
from pipeline.run import execution
from pipeline.run.display import RunDisplay
from pipeline.run.failure import RunFailed, explain, explain_in, on_purpose, stopped_by
from pipeline.run.runner import run
from pipeline.store.store import ArtifactStore
from tests.pipeline.workshop import PIPELINE, Workshop, timed


def committed(workshop: Workshop) -> list[str]:
    """Stages whose artifact is in the store."""
    return sorted(row["stage"] for row in workshop.json("artifacts", "ls", "--store", "store"))


def test_a_cached_run_imports_neither_ray_nor_torch_nor_mlflow_and_is_fast(workshop: Workshop) -> None:
    workshop.write(tracking="sqlite:///mlflow.db")
    workshop.tessera("run", "p.yaml")
    code = (
        "import sys, pipeline.cli.main\n"
        "assert pipeline.cli.main.main(['run', 'p.yaml']) == 0\n"
        "print([m for m in ('ray', 'torch', 'mlflow', 'cv2', 'pandas') if m in sys.modules])"
    )
    shown, seconds = min((timed([sys.executable, "-c", code]) for _ in range(3)), key=lambda run: run[1])
    assert shown.splitlines()[-1] == "[]"
    assert "all 4 stages are cached" in shown
    assert seconds < 3.0


def test_a_failed_run_keeps_what_was_finished_and_continues(workshop: Workshop) -> None:
    workshop.tessera("run", "p.yaml", "--set", "stages.encoder.width=-1", "--set", "stages.scaled.fail=bug", code=1)
    assert committed(workshop) == ["numbers"]
    workshop.tessera("run", "p.yaml", "--set", "stages.scaled.fail=purpose", code=1)
    assert workshop.states("run", "p.yaml") == {
        "numbers": "cached",
        "scaled": "done",
        "encoder": "done",
        "score": "done",
    }
    assert workshop.ran.count("numbers") == 1


def test_two_runs_at_once_compute_every_stage_once(workshop: Workshop) -> None:
    workshop.hold.touch()
    first = workshop.start("run", "p.yaml", "--json")
    workshop.wait_for("scaled")
    second = workshop.start("run", "p.yaml", "--json")
    line = ""
    while "waiting for process" not in line:  # until the second run has found the first one's lease
        assert second.stderr is not None
        line = second.stderr.readline()
        assert line, second.communicate()
    assert str(first.pid) in line
    workshop.hold.unlink()
    states = []
    for process in (first, second):
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        states.append({stage["name"]: stage["state"] for stage in json.loads(output)["stages"]})
    assert sorted(workshop.ran) == ["encoder", "numbers", "scaled", "score"]
    assert committed(workshop) == ["encoder", "numbers", "scaled", "score"]
    assert [{states[0][name], states[1][name]} for name in ("scaled", "score")] == [{"done", "cached"}] * 2


def test_after_kill_9_the_same_command_completes(workshop: Workshop) -> None:
    workshop.hold.touch()
    killed = workshop.start("run", "p.yaml")
    workshop.wait_for("scaled")
    killed.kill()
    killed.communicate()
    assert committed(workshop) == ["numbers"]
    workshop.hold.unlink()
    start = time.monotonic()
    assert workshop.states("run", "p.yaml")["scaled"] == "done"
    assert time.monotonic() - start < 30  # it does not wait until the lease of the killed run is old
    assert workshop.json("artifacts", "verify", "p.yaml")["damaged"] == []


def test_a_second_run_takes_over_when_the_first_is_killed(workshop: Workshop) -> None:
    workshop.hold.touch()
    first = workshop.start("run", "p.yaml")
    workshop.wait_for("scaled")
    second = workshop.start("run", "p.yaml", "--json")
    line = ""
    while "waiting for process" not in line:
        assert second.stderr is not None
        line = second.stderr.readline()
        assert line, second.communicate()
    first.kill()
    first.communicate()
    workshop.hold.unlink()
    output, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    assert [stage["state"] for stage in json.loads(output)["stages"]] == ["cached", "done", "done", "done"]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_is_clean(workshop: Workshop, sent: signal.Signals, code: int) -> None:
    workshop.hold.touch()
    process = workshop.start("run", "p.yaml")
    workshop.wait_for("scaled")
    process.send_signal(sent)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert "scaled: stopped after" in errors
    assert "stopped; what was finished is kept" in errors
    leases = list((workshop.folder / "store/.tessera/leases").rglob("*.json"))
    assert leases == []  # the next run does not have to wait for it
    assert committed(workshop) == ["numbers"]
    workshop.hold.unlink()
    assert workshop.states("run", "p.yaml")["numbers"] == "cached"


def test_what_only_a_finished_artifact_shows_stops_the_run_before_the_stages_between(workshop: Workshop) -> None:
    shown = workshop.tessera("run", "p.yaml", "--set", "stages.score.at_least=4", code=1)
    place = "--set stages.score.at_least=4: stages.score.at_least: "
    assert f"error: stage 'score' failed: {place}numbers holds 3 numbers (lower it)\n" in shown.stderr
    assert workshop.ran == ["numbers"]
    shown = workshop.tessera("plan", "p.yaml", "--set", "stages.score.at_least=4", code=2)  # now the plan knows it
    assert f"error: {place}numbers holds 3 numbers (lower it)\n" in shown.stderr


FORKED = (
    PIPELINE
    + """\
  twice: {{uses: fake_scaled, numbers: numbers, factor: 3}}
  other: {{uses: fake_score, of: twice}}
"""
)


def test_keep_going_runs_what_does_not_need_the_failed_stage(workshop: Workshop) -> None:
    workshop.write(FORKED)
    failing = ("--set", "stages.scaled.fail=purpose")
    workshop.tessera("run", "p.yaml", *failing, code=1)
    assert "twice" not in workshop.ran
    shown = workshop.tessera("run", "p.yaml", *failing, "--keep-going", "--json", code=1)
    states = {stage["name"]: (stage["state"], stage.get("error")) for stage in json.loads(shown.stdout)["stages"]}
    assert states == {
        "numbers": ("cached", None),
        "scaled": ("failed", "the numbers are too odd (take even ones)"),
        "encoder": ("skipped", "it needs 'scaled'"),
        "score": ("skipped", "it needs 'encoder'"),
        "twice": ("done", None),
        "other": ("done", None),
    }
    assert shown.stderr.endswith(
        "error: stage 'scaled' failed: the numbers are too odd (take even ones)\n"
        "stage 'encoder' not run: it needs 'scaled'\n"
        "stage 'score' not run: it needs 'encoder'\n"
    )
    table = workshop.tessera("run", "p.yaml", *failing, "--keep-going", code=1).stdout
    assert "skipped" in table
    assert set(workshop.states("run", "p.yaml", "--keep-going").values()) <= {"cached", "done"}


def test_keep_going_past_a_stage_that_a_finished_artifact_rules_out(workshop: Workshop) -> None:
    states = workshop.states("run", "p.yaml", "--keep-going", "--set", "stages.score.at_least=4", code=1)
    assert states == {"numbers": "done", "scaled": "done", "encoder": "done", "score": "failed"}


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("factor: 3 is odd", "p.yaml:6: stages.scaled.factor: 3 is odd"),
        ("stages.scaled.factor: 3 is odd", "p.yaml:6: stages.scaled.factor: 3 is odd"),
        ("numbers, factor: both are odd", "p.yaml:5: stages.scaled.numbers: both are odd"),
        ("stages.scaled: too odd", "p.yaml:4: stages.scaled: too odd"),
        ("scaled: too odd", "too odd"),
        ("a worker failed: too odd", "a worker failed: too odd"),
    ],
)
def test_a_failure_that_names_a_setting_has_its_line(workshop: Workshop, message: str, shown: str) -> None:
    workshop.write(
        "stages:\n  numbers: {{uses: fake_numbers, source: numbers.txt}}\n"
        "  # the stage\n  scaled:\n    numbers: numbers\n    factor: 3\n    uses: fake_scaled\n"
    )
    assert explain_in(load_pipeline("p.yaml"), "scaled", SourceError(message)) == shown


def test_damage_between_plan_and_use_stops_the_stage_and_names_the_file(workshop: Workshop) -> None:
    workshop.tessera("run", "p.yaml", "--only", "numbers")
    pipeline = load_pipeline("p.yaml")
    store = ArtifactStore(pipeline.store)
    plan = make_plan(pipeline, store)
    (file,) = (workshop.folder / "store" / "numbers").rglob("numbers.*.json")
    file.write_bytes(b"[9.0, 2.0, 3.0]")
    with pytest.raises(RunFailed, match=f"stage 'scaled' failed: .*{file.name}") as failure, RunDisplay() as display:
        run(pipeline, plan, store, display)
    assert not failure.value.is_bug
    assert [stage.state for stage in failure.value.result.stages] == ["cached", "failed", "run", "run"]
    assert set(workshop.states("run", "p.yaml").values()) == {"done"}


@pytest.mark.parametrize("maker", ["2001-01-01T00:00:00.000+00:00", "2999-01-01T00:00:00.000+00:00"])
def test_force_replaces_whatever_the_clock_of_the_machine_that_made_it_said(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, maker: str
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(execution, "now", lambda: maker)
        workshop.tessera("run", "p.yaml")
    assert workshop.states("run", "p.yaml", "--force", "scaled")["scaled"] == "done"
    assert workshop.ran.count("scaled") == 2


def test_force_computes_anew_and_replaces(workshop: Workshop) -> None:
    workshop.tessera("run", "p.yaml")
    before = {row["stage"]: row["created"] for row in workshop.json("artifacts", "ls", "p.yaml")}
    assert workshop.states("run", "p.yaml", "--force", "scaled")["scaled"] == "done"
    after = {row["stage"]: row["created"] for row in workshop.json("artifacts", "ls", "p.yaml")}
    assert after["scaled"] > before["scaled"]
    assert {**after, "scaled": ""} == {**before, "scaled": ""}
    assert workshop.ran.count("scaled") == 2


def test_the_manifest_tells_where_an_artifact_came_from(workshop: Workshop) -> None:
    workshop.tessera("run", "p.yaml")
    (shown,) = workshop.json("artifacts", "show", "numbers", "p.yaml")
    assert shown["uses"] == "fake_numbers"
    assert shown["config"]["source"] == "numbers.txt"
    assert shown["sources"]["source"]["files"] == 1
    assert shown["counts"] == {"numbers": 3}
    assert shown["problems"] == [{"key": "line 9", "reason": "not a number"}]
    assert shown["packages"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "ray", "mlflow"} <= shown["packages"].keys()
    assert shown["seconds"] > 0
    assert shown["created"].endswith("+00:00")


def test_a_read_only_store_serves_a_cached_run(workshop: Workshop) -> None:
    workshop.tessera("run", "p.yaml")
    if os.getuid() == 0:
        pytest.skip("root may write everywhere")
    store = workshop.folder / "store"
    for path in [store, *store.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert set(workshop.states("run", "p.yaml").values()) == {"cached"}
    finally:
        for path in [store, *store.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)


class WrappedLikeRay(Exception):
    """Ray's RayTaskError: a page of traceback as its text, the worker's error in `cause`."""

    def __init__(self, cause: BaseException) -> None:
        self.cause = cause
        super().__init__("ray::task() (pid=1)\n  Traceback ...\n" + str(cause))


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), SystemExit(143)])
def test_an_error_of_cleaning_up_after_an_interrupt_is_the_interrupt(interrupt: BaseException) -> None:
    def interrupted() -> None:
        try:
            raise interrupt
        finally:
            try:
                raise ConnectionError("Ray is gone")
            except ConnectionError as error:
                raise RuntimeError("no relay") from error

    with pytest.raises(RuntimeError) as failure:
        interrupted()
    assert stopped_by(failure.value) is interrupt
    assert stopped_by(ValueError("a bug")) is None


def test_explain_finds_the_sentence_that_was_meant() -> None:
    meant = SourceError("no usable image in data/scenes (put some there)")
    chained = RuntimeError("dataset failed")
    chained.__cause__ = WrappedLikeRay(meant)
    for error in (meant, WrappedLikeRay(meant), WrappedLikeRay(WrappedLikeRay(meant)), chained):
        assert on_purpose(error) is meant
        assert explain(error) == str(meant)
    full = WrappedLikeRay(OSError(28, "Error writing bytes to file"))
    assert "a disk is full: [Errno 28] Error writing bytes" in explain(full)
    assert "tessera artifacts gc" in explain(full)
    bug = WrappedLikeRay(ValueError("bad shape"))
    assert on_purpose(bug) is None
    assert explain(bug) == "ValueError: bad shape"
    assert "part-00003" in explain(ArtifactDamaged("images/0", "part-00003.parquet", "it is missing"))
