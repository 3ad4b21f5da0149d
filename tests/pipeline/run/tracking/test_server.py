"""Tracking at a real `mlflow server` with accounts: who gets in, what MLflow's views show, and servers that fail."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.run.tracking import sender, tracker
from pipeline.run.tracking.journal import are_there_leftovers, leftovers, state_folder
from pipeline.run.tracking.server import QUIET, TrackingAway
from pipeline.run.tracking.tracker import Tracker
from tests.pipeline.run.tracking.servers import (
    PASSWORD,
    USER,
    MlflowServer,
    Proxy,
    everything_below,
    mlflow_server,
    postgres,
)
from tests.pipeline.workshop import PIPELINE, Workshop

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def proxy(server: MlflowServer) -> Iterator[Proxy]:
    standing = Proxy(server.port)
    yield standing
    standing.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TESSERA_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(sender, "RETRY_SECONDS", (0.2,))
    monkeypatch.setattr(sender, "END_SECONDS", 15.0)
    monkeypatch.setattr(sender, "FLUSH_SECONDS", 0.3)
    monkeypatch.setattr(tracker, "ID_SECONDS", 60.0)


@pytest.fixture
def signed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)


def runs_of(server: MlflowServer, experiment: str) -> dict[str, Any]:
    client = server.client()
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id]) if found else []
    assert len({run.info.run_name for run in runs}) == len(runs), "a run is there twice"
    return {run.info.run_name: run for run in runs}


def curve(server: MlflowServer, run: Any, name: str = "loss") -> list[tuple[int, float]]:
    """All stored points, with doubles if there are any."""
    return [(point.step, point.value) for point in server.client().get_metric_history(run.info.run_id, name)]


def give_by_environment(server: MlflowServer, monkeypatch: pytest.MonkeyPatch, home: Path) -> str:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    return server.address


def give_by_file(server: MlflowServer, monkeypatch: pytest.MonkeyPatch, home: Path) -> str:
    (home / ".mlflow").mkdir(parents=True)
    text = f"[mlflow]\nmlflow_tracking_username = {USER}\nmlflow_tracking_password = {PASSWORD}\n"
    (home / ".mlflow" / "credentials").write_text(text)
    return server.address


def give_by_address(server: MlflowServer, monkeypatch: pytest.MonkeyPatch, home: Path) -> str:
    return server.with_password


@pytest.mark.parametrize("give", [give_by_environment, give_by_file, give_by_address])
def test_user_and_password_are_taken_from_where_mlflow_takes_them_and_written_nowhere(
    server: MlflowServer, workshop: Workshop, monkeypatch: pytest.MonkeyPatch, give: Any
) -> None:
    address = give(server, monkeypatch, workshop.folder / "home")
    experiment = give.__name__
    workshop.write(f"name: {experiment}\n{PIPELINE}", tracking=f"{address}\ntracking_required: true")
    shown = workshop.tessera("run", "p.yaml")
    runs = runs_of(server, experiment)
    assert runs.keys() == {experiment, "numbers", "scaled", "encoder", "score"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    (preview,) = server.client().list_artifacts(runs["encoder"].info.run_id)  # uploaded through the server
    assert preview.path.endswith("preview.png")
    (manifest,) = workshop.json("artifacts", "show", "score", "p.yaml")
    found = manifest["tracking"]  # on a busy machine the stage is done before the server has answered
    assert found.get("run", runs["score"].info.run_id) == runs["score"].info.run_id
    assert found.get("record", runs["score"].data.tags["tessera.record"]) == runs["score"].data.tags["tessera.record"]
    (workshop.folder / "home" / ".mlflow" / "credentials").unlink(missing_ok=True)
    assert PASSWORD not in shown.stdout + shown.stderr + everything_below(workshop.folder)


@pytest.mark.parametrize("required", [True, False])
def test_a_wrong_password_is_one_line_with_the_remedy(server: MlflowServer, workshop: Workshop, required: bool) -> None:
    address = f"http://{USER}:not-this-one@127.0.0.1:{server.port}"
    workshop.write(tracking=f"{address}\ntracking_required: {'true' if required else 'false'}")
    shown = workshop.tessera("run", "p.yaml", code=2 if required else 0)
    (line,) = [line for line in shown.stderr.splitlines() if "refuses the user or the password" in line]
    assert "MLFLOW_TRACKING_USERNAME" in line
    assert "not-this-one" not in shown.stderr + shown.stdout + everything_below(workshop.folder)
    assert len(workshop.ran) == (0 if required else 4)
    assert are_there_leftovers(address) is not required  # what a started run has told is kept for the right password


@pytest.mark.usefixtures("signed_in")
def test_encoders_are_models_that_mlflow_orders_by_their_results_on_a_dataset(
    server: MlflowServer, workshop: Workshop
) -> None:
    text = (
        f"name: compare\n{PIPELINE}"
        "  wide: {{uses: fake_encoder, numbers: scaled, width: 5}}\n"
        "  of_wide: {{uses: fake_score, of: wide, on: numbers}}\n"
    ).replace("of: encoder}}", "of: encoder, on: numbers}}")
    workshop.write(text, tracking=server.address)
    workshop.tessera("run", "p.yaml")
    workshop.tessera("run", "p.yaml", "--force", "score")  # the encoders are cached
    client = server.client()
    experiment = client.get_experiment_by_name("compare").experiment_id
    rows = {row["stage"]: row for row in workshop.json("artifacts", "ls", "p.yaml")}
    digest = rows["numbers"]["fingerprint"][:36]
    order = {"field_name": "metrics.bytes", "dataset_name": "numbers", "dataset_digest": digest, "ascending": False}
    models = client.search_logged_models([experiment], order_by=[order])
    assert sorted(model.name for model in models) == ["encoder", "wide"]  # the cached ones are not made again
    for model in models:
        assert model.status == "READY"
        assert model.tags["tessera.address"] == rows[model.name]["address"]
        assert model.params["width"] == ("5" if model.name == "wide" else "3")
        assert {(m.key, m.dataset_name, m.dataset_digest) for m in model.metrics} == {("bytes", "numbers", digest)}
    none = client.search_logged_models(
        [experiment], "metrics.bytes > 0", datasets=[{"dataset_name": "numbers", "dataset_digest": "another"}]
    )
    assert not none
    runs = client.search_runs([experiment], "attributes.run_name = 'score'")
    read = {client.get_run(run.info.run_id).inputs.model_inputs[0].model_id for run in runs}
    assert len(runs) == 2
    assert read == {model.model_id for model in models if model.name == "encoder"}


@pytest.mark.usefixtures("signed_in")
def test_a_model_of_a_run_that_was_not_tracked_is_made_when_it_is_evaluated(
    server: MlflowServer, workshop: Workshop
) -> None:
    workshop.write(f"name: untracked\n{PIPELINE}")
    workshop.tessera("run", "p.yaml", "--from", "encoder")
    workshop.tessera("run", "p.yaml", "--force", "score", "--set", f"tracking={server.address}")
    client = server.client()
    experiment = client.get_experiment_by_name("untracked").experiment_id
    (model,) = client.search_logged_models([experiment])
    assert (model.name, model.params["width"]) == ("encoder", "3")
    assert [metric.key for metric in model.metrics] == ["bytes"]


@pytest.mark.usefixtures("signed_in")
@pytest.mark.parametrize("mode", ["503", "hang", "lose"])
def test_what_a_server_did_not_take_is_there_once_when_it_is_well_again(
    server: MlflowServer, proxy: Proxy, mode: str
) -> None:
    """Three answers of a sick server; "lose": it does what it is asked, and its answers do not arrive."""
    warnings: list[str] = []
    tracked = Tracker(f"http://127.0.0.1:{proxy.port}", f"sick {mode}", warnings.append)
    proxy.mode = mode
    before = int(time.time() * 1000)
    tracked.start("whole", {})
    stage = tracked.stage("train", {}, {"a": {"b": 1}})
    for step in range(50):
        stage.log_metrics({"loss": step / 7}, step)
    while not warnings:
        time.sleep(0.05)
    assert "is away" in warnings[0]
    after = int(time.time() * 1000)
    proxy.mode = "pass"
    assert stage.run_id or wait_for_id(stage)
    proxy.mode = mode
    for step in range(50, 1200):
        stage.log_metrics({"loss": step / 7}, step)
    time.sleep(3)
    proxy.mode = "pass"
    stage.finish("FINISHED")
    tracked.finish("FINISHED", {"train.x": 1.0})
    assert len(warnings) == 1
    runs = runs_of(server, f"sick {mode}")
    assert {name: run.info.status for name, run in runs.items()} == {"whole": "FINISHED", "train": "FINISHED"}
    assert before <= runs["whole"].info.start_time <= after
    assert runs["train"].data.params == {"a.b": "1"}
    assert runs["train"].data.tags["mlflow.parentRunId"] == runs["whole"].info.run_id
    assert curve(server, runs["train"]) == [(step, step / 7) for step in range(1200)]
    assert not are_there_leftovers(tracked.uri or "")


def wait_for_id(stage: Any) -> bool:
    end = time.monotonic() + 60
    while stage.run_id is None and time.monotonic() < end:
        time.sleep(0.1)
    return stage.run_id is not None


@pytest.mark.usefixtures("signed_in")
def test_no_step_waits_for_a_server_that_hangs(server: MlflowServer, proxy: Proxy) -> None:
    tracked = Tracker(f"http://127.0.0.1:{proxy.port}", "hanging", [].append)
    proxy.mode = "hang"
    tracked.start("whole", {})
    stage = tracked.stage("train", {}, {})
    seconds: list[float] = []
    end = time.monotonic() + 5
    while time.monotonic() < end:
        began = time.perf_counter()
        stage.log_metrics({"loss": 1.0, "lr": 0.1}, len(seconds))
        seconds.append(time.perf_counter() - began)
        time.sleep(0.005)
    assert proxy.requests > 0
    assert max(seconds) < 1.5  # waiting for the server would take the two seconds of a request
    assert statistics.median(seconds) < 0.005
    proxy.mode = "pass"
    stage.finish("FINISHED")
    tracked.finish("FINISHED", {})
    assert len(curve(server, runs_of(server, "hanging")["train"])) == len(seconds)


KILLED_RUN = """
import os, signal, sys
from pipeline.run.tracking import tracker
tracker.ID_SECONDS = 120.0
tracked = tracker.Tracker(sys.argv[1], "killed", print)
tracked.start("whole", {})
stage = tracked.stage("train", {}, {"a": 1})
done = tracked.stage("images", {}, {})
done.finish("FINISHED")
if sys.argv[2] == "known":
    assert stage.run_id
for step in range(300):
    stage.log_metrics({"loss": float(step)}, step)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.usefixtures("signed_in")
@pytest.mark.parametrize("how", ["known", "away"])
def test_records_outlive_a_killed_run_and_its_runs_end_as_killed(
    server: MlflowServer, workshop: Workshop, proxy: Proxy, how: str
) -> None:
    if how == "away":
        proxy.mode = "503"
    address = f"http://127.0.0.1:{proxy.port}"
    before = int(time.time() * 1000)
    killed = subprocess.run([sys.executable, "-c", KILLED_RUN, address, how], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    after = int(time.time() * 1000)
    proxy.mode = "pass"
    (waiting,) = workshop.json("tracking", "ls")
    assert waiting["pipeline"] == "killed"
    if how == "known":
        assert workshop.json("tracking", "send") == {"runs": 1}
    else:  # the next run with this address does it
        workshop.write(f"name: next\n{PIPELINE}", tracking=address)
        workshop.tessera("run", "p.yaml")
    assert workshop.json("tracking", "ls") == []
    client = server.client()
    experiment = client.get_experiment_by_name("killed").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment], max_results=3)}
    assert {name: run.info.status for name, run in runs.items()} == {
        "whole": "KILLED",
        "train": "KILLED",
        "images": "FINISHED",
    }
    assert before <= runs["train"].info.start_time <= runs["train"].info.end_time <= after
    assert curve(server, runs["train"]) == [(step, float(step)) for step in range(300)]
    for run in runs.values():
        client.delete_run(run.info.run_id)


@pytest.mark.usefixtures("signed_in")
def test_an_address_that_is_away_is_said_by_the_command_and_nothing_is_lost(
    server: MlflowServer, workshop: Workshop, proxy: Proxy
) -> None:
    address = f"http://127.0.0.1:{proxy.port}"
    proxy.mode = "503"
    workshop.write(f"name: later\n{PIPELINE}", tracking=address)
    shown = workshop.tessera("run", "p.yaml")
    assert shown.stderr.count("warning:") == 1
    (manifest,) = workshop.json("artifacts", "show", "score", "p.yaml")
    record = manifest["tracking"]["record"]  # the server has given no id
    assert "is away" in workshop.tessera("tracking", "send", "p.yaml", code=1).stderr
    proxy.mode = "pass"
    assert "sent the records of 1 runs" in workshop.tessera("tracking", "send", "p.yaml").stdout
    runs = runs_of(server, "later")
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs["score"].data.tags["tessera.record"] == record
    assert curve(server, runs["scaled"], "loss/term") == [(0, 2.0), (1, 4.0), (2, 6.0)]
    # A fully cached run sends what an earlier one has left, too.
    proxy.mode = "503"
    workshop.tessera("run", "p.yaml", "--force", "score")
    proxy.mode = "pass"
    assert workshop.tessera("run", "p.yaml").stderr.count("warning:") == 0
    assert not are_there_leftovers(address)


@pytest.mark.usefixtures("signed_in")
def test_a_record_that_is_never_taken_does_not_stop_the_others(server: MlflowServer) -> None:
    warnings: list[str] = []
    tracked = Tracker(server.address, "never taken", warnings.append)
    tracked.start("whole", {})
    first, second = tracked.stage("first", {}, {}), tracked.stage("second", {}, {})
    assert first.run_id is not None
    server.client().delete_run(first.run_id)  # by a colleague, in the middle
    for step in range(20):
        first.log_metrics({"loss": 1.0}, step)
        second.log_metrics({"loss": 1.0}, step)
    first.finish("FINISHED")
    second.finish("FINISHED")
    tracked.finish("FINISHED", {})
    assert len(warnings) == 1
    assert "left out" in warnings[0]
    assert len(curve(server, runs_of(server, "never taken")["second"])) == 20


def test_required_tracking_leaves_no_records_when_the_server_refuses(server: MlflowServer) -> None:
    tracked = Tracker(f"http://{USER}:wrong-password@127.0.0.1:{server.port}", "refused", print)
    with pytest.raises(TrackingAway, match="refuses the user or the password"):
        tracked.start("whole", {}, required=True)
    assert not list(leftovers())
    assert not [file for file in state_folder().rglob("*") if file.is_file()]


@pytest.mark.chaos
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_a_server_killed_in_the_middle_of_a_run_has_all_of_it_once_when_it_is_back(
    tmp_path: Path, workshop: Workshop, monkeypatch: pytest.MonkeyPatch, database: str
) -> None:
    """kill -9 while metrics arrive, from several threads' stages; on both databases."""
    import contextlib
    import threading

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    with contextlib.ExitStack() as stack:
        backend = stack.enter_context(postgres()) if database == "postgresql" else None
        server = stack.enter_context(mlflow_server(tmp_path, backend))
        warnings: list[str] = []
        tracked = Tracker(server.address, "middle", warnings.append)
        tracked.start("whole", {}, required=True)
        enough = threading.Event()
        counts: dict[str, int] = {}

        def train(name: str) -> None:
            stage, step = tracked.stage(name, {}, {"name": name}), 0
            while not enough.is_set():
                stage.log_metrics({"loss": float(step), "lr": 0.5}, step)
                step += 1
                time.sleep(0.005)
            counts[name] = step
            stage.finish("FINISHED")

        threads = [threading.Thread(target=train, args=(f"stage {i}",)) for i in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(2):
            time.sleep(4)
            server.kill()
            time.sleep(3)
            server.start()
        enough.set()
        for thread in threads:
            thread.join()
        tracked.finish("FINISHED", {})
        assert len(warnings) == 1
        runs = runs_of(server, "middle")
        assert {run.info.status for run in runs.values()} == {"FINISHED"}
        assert runs.keys() == {"whole", *counts}
        for name, count in counts.items():
            for metric in ("loss", "lr"):
                assert [step for step, _ in curve(server, runs[name], metric)] == list(range(count))
        assert not are_there_leftovers(server.address)
