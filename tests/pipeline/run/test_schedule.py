"""Stages that do not need each other at the same time: overlap, shares, failures, interrupts. Ray is faked."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from pipeline.config.load import load_pipeline
from pipeline.plan.plan import make_plan
from pipeline.run import cluster, schedule
from pipeline.run.display import RunDisplay
from pipeline.run.runner import run
from pipeline.store.store import ArtifactStore
from tests.pipeline.workshop import FAKES, Workshop

FORK = """\
store: store
tracking: {tracking}
stages:
  numbers: {{uses: fake_numbers, source: numbers.txt}}
  left: {{uses: fake_meeting, numbers: numbers, tag: left, meets: [right]}}
  right: {{uses: fake_meeting, numbers: numbers, tag: right, meets: [left]}}
"""


@pytest.fixture
def fork(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Workshop]:
    """`fork(text, cpus)`: a workshop with this pipeline, on fake nodes with so many CPUs each."""

    def make(text: str = FORK, cpus: str = "2", tracking: str = "null") -> Workshop:
        workshop.write(text, tracking)
        workshop.extra["TESSERA_FAKES_CPUS"] = cpus
        monkeypatch.setattr(cluster, "start", cluster.start)  # put back afterwards
        monkeypatch.setattr(cluster, "stop", cluster.stop)
        sys.path.insert(0, str(FAKES)) if str(FAKES) not in sys.path else None
        import tessera_fakes

        tessera_fakes.fake_cluster(cpus)
        return workshop

    return make


def lines(workshop: Workshop, *starts: str) -> list[str]:
    """The lines of the fakes' log that begin with one of these words."""
    return [line for line in (workshop.folder / "log").read_text().splitlines() if line.split()[0] in starts]


def leases(workshop: Workshop) -> list[str]:
    return [path.name for path in (workshop.folder / "store/.tessera/leases").rglob("*.json")]


def test_two_stages_that_wait_for_each_other_run_side_by_side_with_half_the_cluster_each(
    fork: Callable[..., Workshop],
) -> None:
    workshop = fork(tracking="sqlite:///mlflow.db")
    assert set(workshop.states("run", "p.yaml").values()) == {"done"}
    assert sorted(lines(workshop, "share")) == ["share left 1", "share right 1"]
    assert {use.stage for use in _uses(workshop)} == {"numbers", "left", "right"}
    import mlflow

    client = mlflow.MlflowClient("sqlite:///mlflow.db")
    (experiment,) = (e for e in client.search_experiments() if e.name == "p")
    runs = client.search_runs([experiment.experiment_id])
    assert {(r.info.run_name, r.info.status) for r in runs} == {
        (name, "FINISHED") for name in ("p", "numbers", "left", "right")
    }
    (parent,) = (r.info.run_id for r in runs if r.info.run_name == "p")
    assert {r.data.tags.get("mlflow.parentRunId") for r in runs if r.info.run_name != "p"} == {parent}
    left = next(r for r in runs if r.info.run_name == "left")
    assert [m.value for m in client.get_metric_history(left.info.run_id, "loss")] == [0.0, 1.0, 2.0]


def _uses(workshop: Workshop) -> list:
    from pipeline.store.uses import known_users

    store = ArtifactStore(str(workshop.folder / "store"))
    return [use for artifact in store.artifacts() for use in known_users(artifact)]


@pytest.mark.parametrize(("cpus", "options"), [("1", ()), ("4", ("--parallel", "1"))])
def test_without_room_or_when_asked_for_stages_run_one_after_the_other(
    fork: Callable[..., Workshop], cpus: str, options: tuple[str, ...]
) -> None:
    workshop = fork(FORK.replace(", meets: [right]", "").replace(", meets: [left]", ""), cpus)
    assert set(workshop.states("run", "p.yaml", *options).values()) == {"done"}
    assert lines(workshop, "run", "share", "end")[1:] == [
        *("run left", "share left all", "end left"),
        *("run right", "share right all", "end right"),
    ]


GREEDY = (
    FORK
    + """\
  training: {{uses: fake_greedy, numbers: numbers, tag: training, after: [left, right]}}
  late: {{uses: fake_meeting, numbers: left, tag: late, after: [training]}}
"""
)


def test_a_training_waits_for_the_whole_cluster_and_later_stages_wait_for_it(fork: Callable[..., Workshop]) -> None:
    workshop = fork(GREEDY, "2,2")
    assert set(workshop.states("run", "p.yaml").values()) == {"done"}
    assert sorted(lines(workshop, "share")) == [
        "share late all",
        "share left 2",
        "share right 2",
        "share training all",
    ]


def test_stages_in_the_drivers_process_run_one_after_the_other(fork: Callable[..., Workshop]) -> None:
    text = FORK.replace("fake_meeting", "fake_in_driver").replace(", meets: [right]", "").replace("meets", "after")
    workshop = fork(text)
    assert set(workshop.states("run", "p.yaml").values()) == {"done"}
    assert lines(workshop, "run", "end") == ["run numbers", "run left", "end left", "run right", "end right"]


BESIDE = """\
store: store
tracking: {tracking}
stages:
  numbers: {{uses: fake_numbers, source: numbers.txt}}
  left: {{uses: fake_meeting, numbers: numbers, tag: left, meets: [right]}}
  right: {{uses: fake_meeting, numbers: numbers, tag: right, after: [left]}}
  below: {{uses: fake_meeting, numbers: right, tag: below}}
"""


def test_what_runs_beside_a_stage_that_fails_is_finished_and_nothing_new_starts(fork: Callable[..., Workshop]) -> None:
    workshop = fork(BESIDE)
    shown = workshop.tessera("run", "p.yaml", "--set", "stages.left.fail=yes", "--json", code=1)
    states = {stage["name"]: stage["state"] for stage in json.loads(shown.stdout)["stages"]}
    assert states == {"numbers": "done", "left": "failed", "right": "done", "below": "run"}
    assert "the run ends when what runs beside it is done: right" in shown.stderr
    assert shown.stderr.endswith("error: stage 'left' failed: left is too odd (take even ones)\n")
    assert workshop.states("run", "p.yaml", "--set", "stages.left.meets=[]") == {
        "numbers": "cached",
        "left": "done",
        "right": "cached",
        "below": "done",
    }


def test_of_several_failures_the_first_comes_first_and_all_are_named(fork: Callable[..., Workshop]) -> None:
    workshop = fork(BESIDE)
    failing = ("--set", "stages.left.fail=yes", "--set", "stages.right.fail=yes")
    shown = workshop.tessera("run", "p.yaml", *failing, code=1)
    assert shown.stderr.endswith(
        "error: stage 'left' failed: left is too odd (take even ones)\n"
        "stage 'right' failed: right is too odd (take even ones)\n"
    )


def test_keep_going_starts_what_does_not_need_the_failed_one(fork: Callable[..., Workshop]) -> None:
    workshop = fork(BESIDE + "  lost: {{uses: fake_meeting, numbers: left, tag: lost}}\n")
    states = workshop.states("run", "p.yaml", "--keep-going", "--set", "stages.left.fail=yes", code=1)
    assert states == {"numbers": "done", "left": "failed", "right": "done", "below": "done", "lost": "skipped"}


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_reaches_all_that_runs(fork: Callable[..., Workshop], sent: signal.Signals, code: int) -> None:
    workshop = fork()
    workshop.hold.touch()
    process = workshop.start("run", "p.yaml")
    workshop.wait_for("left")
    workshop.wait_for("right")
    process.send_signal(sent)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert sorted(lines(workshop, "interrupted")) == ["interrupted left", "interrupted right"]
    assert "left: stopped after" in errors
    assert "right: stopped after" in errors
    assert errors.endswith("stopped; what was finished is kept, the same command continues\n")
    assert leases(workshop) == []
    workshop.hold.unlink()
    assert workshop.states("run", "p.yaml") == {"numbers": "cached", "left": "done", "right": "done"}


def test_a_second_interrupt_does_not_wait_for_a_stage_that_cannot_be_reached(fork: Callable[..., Workshop]) -> None:
    workshop = fork()
    process = workshop.start("run", "p.yaml", "--set", "stages.left.stuck=60")
    workshop.wait_for("left")
    workshop.wait_for("right")
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=1.5)  # it is given time
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130, errors
    assert "left: stopped after" in errors
    assert leases(workshop) == []


def test_an_interrupt_waits_for_a_stage_for_a_limited_time(
    fork: Callable[..., Workshop], monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop = fork(FORK.replace("meets: [right]", "stuck: 3"))
    monkeypatch.setattr(schedule, "STOP_SECONDS", 0.2)
    pipeline = load_pipeline("p.yaml")
    store = ArtifactStore(pipeline.store)
    plan = make_plan(pipeline, store)

    def interrupt() -> None:
        workshop.wait_for("right")
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    sender = threading.Thread(target=interrupt)
    sender.start()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), RunDisplay() as display:
            run(pipeline, plan, store, display)
    finally:
        signal.signal(signal.SIGINT, handler)
        sender.join()
    assert leases(workshop) == []
    for thread in threading.enumerate():
        if thread.name == "stage left":
            thread.join(10)
    assert "end left" not in lines(workshop, "end")  # the interrupt reaches it when it looks up


def test_a_run_works_outside_the_main_thread(fork: Callable[..., Workshop]) -> None:
    workshop = fork()
    pipeline = load_pipeline("p.yaml")
    store = ArtifactStore(pipeline.store)
    plan = make_plan(pipeline, store)
    states: list[str] = []

    def work() -> None:
        with RunDisplay() as display:
            states.extend(stage.state for stage in run(pipeline, plan, store, display).stages)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert states == ["done"] * 3
    assert leases(workshop) == []


def test_two_stages_with_the_same_artifact_compute_it_once(fork: Callable[..., Workshop]) -> None:
    workshop = fork(FORK.replace("tag: left", "tag: same").replace("tag: right, meets: [left]", "tag: same"))
    text = (workshop.folder / "p.yaml").read_text().replace(", meets: [right]", "")
    (workshop.folder / "p.yaml").write_text(text)
    shown = workshop.tessera("run", "p.yaml", "--json")
    states = {stage["name"]: stage["state"] for stage in json.loads(shown.stdout)["stages"]}
    assert states == {"numbers": "done", "left": "done", "right": "cached"}
    assert "right: has the same settings as a stage that is computed now" in shown.stderr
    assert lines(workshop, "run") == ["run numbers", "run left"]


def test_two_runs_of_a_fork_compute_every_stage_once_and_wait_without_a_share(fork: Callable[..., Workshop]) -> None:
    """The second run waits for both stages of the first, and computes the third meanwhile."""
    workshop = fork(FORK + "  third: {{uses: fake_meeting, numbers: numbers, tag: third}}\n")
    workshop.hold.touch()
    first = workshop.start("run", "p.yaml", "--only", "numbers,left,right", "--json")
    workshop.wait_for("left")
    workshop.wait_for("right")
    second = workshop.start("run", "p.yaml", "--json")
    workshop.wait_for("third")  # though left and right come before it, and two CPUs are all there are
    workshop.hold.unlink()
    for process in (first, second):
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    states = {stage["name"]: stage["state"] for stage in json.loads(output)["stages"]}
    assert states == {"numbers": "cached", "left": "cached", "right": "cached", "third": "done"}
    assert errors.count("made by another run meanwhile") == 2
    assert sorted(workshop_runs(workshop)) == ["left", "numbers", "right", "third"]


def workshop_runs(workshop: Workshop) -> list[str]:
    return [line.removeprefix("run ") for line in lines(workshop, "run")]
