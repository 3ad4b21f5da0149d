"""How a run is tracked: nested runs with inputs and outputs; and that no failure of MLflow's fails the run."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from pipeline.errors import UsageError
from pipeline.run.tracking import tracker
from pipeline.run.tracking.address import absolute_uri, anonymous, how_to_open, masked
from pipeline.run.tracking.records import flatten
from pipeline.run.tracking.server import QUIET
from pipeline.run.tracking.tracker import Tracker
from tests.pipeline.workshop import Workshop

DATABASE = "sqlite:///mlflow.db"


@pytest.fixture
def mlflow_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tracker, "ID_SECONDS", 120.0)


@pytest.mark.usefixtures("mlflow_quiet")
def test_a_run_is_tracked_with_nested_runs_inputs_outputs_and_curves(workshop: Workshop) -> None:
    workshop.write(tracking=DATABASE)
    workshop.tessera("run", "p.yaml")
    from mlflow import MlflowClient

    client = MlflowClient(absolute_uri(DATABASE))
    experiment = client.get_experiment_by_name("p")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {"p", "numbers", "scaled", "encoder", "score"}
    parent = runs.pop("p")
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert {run.info.status for run in (parent, *runs.values())} == {"FINISHED"}
    assert parent.data.metrics == {"score.bytes": 3.0}
    assert runs["score"].data.metrics["bytes"] == 3.0
    assert runs["encoder"].data.params["width"] == "3"
    curve = client.get_metric_history(runs["scaled"].info.run_id, "loss/term")
    assert [(point.step, point.value) for point in curve] == [(0, 2.0), (1, 4.0), (2, 6.0)]

    rows = {row["stage"]: row for row in workshop.json("artifacts", "ls", "p.yaml")}
    assert {name: run.data.tags["tessera.fingerprint"] for name, run in runs.items()} == {
        name: row["fingerprint"] for name, row in rows.items()
    }
    digests = {
        name: {tag.value: entry.dataset.digest for entry in run.inputs.dataset_inputs for tag in entry.tags[:1]}
        for name, run in runs.items()
    }
    assert digests["scaled"] == {
        "numbers": rows["numbers"]["fingerprint"],
        "output": rows["scaled"]["fingerprint"],
    }
    assert digests["numbers"].keys() == {"source", "output"}
    # The encoder is a model in MLflow's terms: an output of its run, an input of the next.
    (made,) = runs["encoder"].outputs.model_outputs
    (read,) = client.get_run(runs["score"].info.run_id).inputs.model_inputs  # the result of a search does not have them
    assert made.model_id == read.model_id
    assert client.get_logged_model(made.model_id).tags["tessera.address"] == rows["encoder"]["address"]
    (picture,) = client.list_artifacts(runs["encoder"].info.run_id)
    assert picture.path == "preview.png"
    assert (workshop.folder / "mlflow").is_dir()  # beside the database, not in the current folder's mlruns
    assert not (workshop.folder / "mlruns").exists()

    (manifest,) = workshop.json("artifacts", "show", "score", "p.yaml")
    assert manifest["tracking"]["run"] == runs["score"].info.run_id


@pytest.mark.usefixtures("mlflow_quiet")
def test_a_failed_stage_is_a_failed_run(workshop: Workshop) -> None:
    workshop.write(tracking=DATABASE)
    workshop.tessera("run", "p.yaml", "--set", "stages.scaled.fail=purpose", code=1)
    from mlflow import MlflowClient

    client = MlflowClient(absolute_uri(DATABASE))
    runs = client.search_runs([client.get_experiment_by_name("p").experiment_id])
    assert {run.info.run_name: run.info.status for run in runs} == {
        "p": "FAILED",
        "numbers": "FINISHED",
        "scaled": "FAILED",
    }


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.mark.usefixtures("mlflow_quiet")
def test_a_dead_server_costs_one_warning_and_no_result(workshop: Workshop) -> None:
    workshop.write(tracking=f"http://user:secret@127.0.0.1:{closed_port()}")
    start = time.monotonic()
    shown = workshop.tessera("run", "p.yaml")
    assert time.monotonic() - start < 20
    assert shown.stderr.count("warning:") == 1
    assert "tessera tracking send" in shown.stderr
    assert "secret" not in shown.stderr + shown.stdout
    assert len(workshop.json("artifacts", "ls", "p.yaml")) == 4


@pytest.fixture
def silent_server() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        held: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    held.append(listener.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
    for connection in held:
        connection.close()


@pytest.mark.usefixtures("mlflow_quiet")
def test_a_server_that_never_answers_does_not_hang_the_run(
    workshop: Workshop, silent_server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    workshop.write(tracking=f"http://127.0.0.1:{silent_server}")
    start = time.monotonic()
    shown = workshop.tessera("run", "p.yaml")
    assert time.monotonic() - start < 60
    assert shown.stderr.count("warning:") == 1
    assert len(workshop.json("artifacts", "ls", "p.yaml")) == 4


@pytest.mark.usefixtures("mlflow_quiet")
def test_tracking_that_breaks_in_the_middle_is_told_once(tmp_path: Path) -> None:
    warnings: list[str] = []
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "p", warnings.append)
    tracker.start("p", {})
    stage = tracker.stage("numbers", {}, {"a": 1})
    assert stage.run_id is not None
    (tmp_path / "mlflow.db").write_bytes(b"not a database any more")
    for step in range(1000):
        stage.log_metrics({"loss": 1.0}, step)
    stage.finish("FINISHED")
    tracker.finish("FINISHED", {"score.x": 1.0})
    assert len(warnings) == 1
    assert "tessera tracking send" in warnings[0]


def test_without_a_tracking_address_nothing_is_imported() -> None:
    code = (
        "import sys; from pipeline.run.tracking.tracker import Tracker\n"
        "t = Tracker(None, 'p', print); t.start('p', {});"
        "s = t.stage('a', {}, {'x': 1}); s.log_metrics({'m': 1.0}, 0); s.finish('FINISHED'); t.finish('FINISHED', {});"
        "print('mlflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_processes_started_together_make_one_database_and_one_experiment(tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path}/new/mlflow.db"
    code = (
        "from pipeline.run.tracking.tracker import Tracker; import sys\n"
        f"t = Tracker('{address}', 'p', lambda text: print(text, file=sys.stderr)); t.start('p', {{}})\n"
        "t.finish('FINISHED', {}); print(t.run_id)"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    ended = [(*process.communicate(timeout=300), process.returncode) for process in started]
    assert [returned for *_, returned in ended] == [0, 0, 0], ended
    client = mlflow.MlflowClient(address)
    [experiment] = [found for found in client.search_experiments() if found.name == "p"]
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.run_id for run in runs} == {output.strip() for output, *_ in ended}
    assert len(runs) == 3


def test_addresses() -> None:
    assert absolute_uri("sqlite:///a/b.db") == f"sqlite:///{Path('a/b.db').absolute()}"
    assert absolute_uri("sqlite:////a/b.db") == "sqlite:////a/b.db"
    assert absolute_uri("http://host:5000") == "http://host:5000"
    for refused in ("file:mlruns", "file:///mlruns", "mlruns"):
        with pytest.raises(UsageError, match="sqlite:///"):
            absolute_uri(refused)
    assert masked("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"
    assert masked("http://host:5000/x") == "http://host:5000/x"
    assert anonymous("http://me:secret@host:5000/x/") == anonymous("http://host:5000/x") == "http://host:5000/x"
    assert how_to_open("sqlite:////a/b.db") == "mlflow ui --backend-store-uri sqlite:////a/b.db"
    assert how_to_open("http://host:5000") == "http://host:5000"


def test_settings_flatten_to_the_paths_that_set_takes() -> None:
    settings = {
        "method": {"name": "cotap", "weights": {"sc_patch": 1.0}},
        "images": [{"from": "a", "weight": 1}, {"from": "b", "weight": 2}],
        "sizes": [1, 2],
        "none": None,
        "empty": {},
        "on": True,
    }
    assert flatten(settings) == {
        "method.name": "cotap",
        "method.weights.sc_patch": "1.0",
        "images.0.from": "a",
        "images.0.weight": "1",
        "images.1.from": "b",
        "images.1.weight": "2",
        "sizes": "[1, 2]",
        "none": "null",
        "empty": "{}",
        "on": "true",
    }
