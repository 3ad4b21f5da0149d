"""The doctor says what is wrong before a long run meets it; it never hangs, and never fails itself."""

from __future__ import annotations

import contextlib
import json
import socket
import sqlite3
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

from pipeline.run import cluster, doctor, tracking
from pipeline.run.doctor import FAIL, OK, WARN, Check
from pipeline.store.store import ArtifactStore
from tests.pipeline.workshop import PIPELINE, Workshop


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**tracking.QUIET, **cluster.QUIET}.items():
        monkeypatch.setenv(name, value)


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_every_failure_and_warning_has_a_remedy(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "RAY_SECONDS", 0.01)
    monkeypatch.setattr(doctor, "NO_DISK", 1 << 60)
    monkeypatch.setattr(doctor, "LOW_MEMORY", 1 << 60)
    monkeypatch.setattr(doctor, "OPEN_FILES", 1 << 40)
    checks = list(doctor.examine(ArtifactStore("store"), "http://127.0.0.1:1", None))
    found = by_name(checks)
    assert found["store disk"].state == found["spill disk"].state == found["tracking"].state == FAIL
    assert found["memory"].state == found["open files"].state == WARN
    assert found["ray cluster"].state == FAIL
    assert "no answer within" in found["ray cluster"].detail
    assert all(check.remedy for check in checks if check.state != OK)
    assert not any(check.remedy for check in checks if check.state == OK)


def answering(**changes: object) -> subprocess.Popen[str]:
    """A process that answers as the one which asks Ray."""
    seen = {
        "cluster": "R",
        "where": "R",
        "gpus": 0,
        "torch_gpus": 0,
        "remote": False,
        "machines": [[2, 0]],
        "most": None,
    }
    command = [sys.executable, "-c", f"print({json.dumps(json.dumps(seen | changes))})"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_what_a_run_would_trip_over_is_found_and_nothing_is_left(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_ask_ray", lambda address: answering())
    workshop.write(PIPELINE + "  big: {{uses: fake_on_ray, numbers: numbers}}\n", tracking="sqlite:///deep/mlflow.db")
    found = workshop.json("doctor", "p.yaml", "--store", "deep/store")["checks"]
    assert {check["name"]: check["state"] for check in found}.items() >= {
        ("plan", OK),
        ("store", OK),
        ("tracking", OK),
        ("resources", OK),
    }
    arguments = ("--set", "stages.big.resources.gpus=1", "--set", "stages.scaled.resources.cpus=999")
    found = workshop.json("doctor", "p.yaml", *arguments, code=1)["checks"]
    wrong = {check["name"]: check for check in found if check["state"] == FAIL}
    assert "stages.scaled.resources.cpus: the stage asks for 999 CPUs" in wrong["start"]["detail"]
    assert "stages.big.resources.gpus: the stage asks for 1 CPU and 1 GPU, R has 2 CPUs" in wrong["resources"]["detail"]
    monkeypatch.setattr(doctor, "_ask_ray", lambda address: answering(most=[8, 1]))
    found = workshop.json("doctor", "p.yaml", "--set", "stages.big.resources.gpus=1")["checks"]
    (grows,) = (check for check in found if check["name"] == "resources")
    assert (grows["state"], "the autoscaler must add nodes" in grows["remedy"]) == (WARN, True)
    found = workshop.json("doctor", "p.yaml", "--set", "stages.numbers.source=number.txt", code=1)["checks"]
    (wrong_source,) = (check for check in found if check["state"] == FAIL)
    assert wrong_source["detail"].startswith(
        "--set stages.numbers.source=number.txt: stages.numbers.source: nothing is at"
    )
    assert wrong_source["remedy"] == "did you mean 'numbers.txt'?"
    assert sorted(path.name for path in workshop.folder.iterdir()) == ["numbers.txt", "p.yaml"]
    assert "name its file too" in workshop.tessera("doctor", "--set", "a.b=1", code=2).stderr


def test_a_database_is_tried_without_mlflow(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    with contextlib.closing(sqlite3.connect(file)) as other:
        other.execute("CREATE TABLE t (x)")
        (check,) = doctor._tracking(f"sqlite:///{file}")
        assert (check.state, check.detail) == (OK, f"sqlite:///{file}: readable and writable")
        other.execute("BEGIN EXCLUSIVE")
        (check,) = doctor._tracking(f"sqlite:///{file}")
        assert (check.state, "locked" in check.detail) == (FAIL, True)
    file.write_text("no database, but long enough to be read as the head of one " * 20)
    (check,) = doctor._tracking(f"sqlite:///{file}")
    assert (check.state, "not a database" in check.detail) == (FAIL, True)


@pytest.mark.ray
@pytest.mark.slow
def test_a_healthy_machine_passes(workshop: Workshop) -> None:
    workshop.write(tracking="sqlite:///mlflow.db")
    report = workshop.json("doctor", "p.yaml")
    states = {check["name"]: check["state"] for check in report["checks"]}
    assert FAIL not in states.values(), report
    assert {
        "python",
        "ray",
        "mlflow",
        "torch",
        "store",
        "store disk",
        "spill disk",
        "tracking",
        "gpus",
    } <= states.keys()
    detail = next(check["detail"] for check in report["checks"] if check["name"] == "ray cluster")
    assert "CPUs" in detail
    assert sorted(path.name for path in workshop.folder.iterdir()) == ["numbers.txt", "p.yaml"]  # nothing is left


def test_old_and_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "timm":
            raise metadata.PackageNotFoundError(name)
        return {"mlflow": "3.17.1", "ray": "2.60.0", "torch": "2.10.0+cu128"}.get(name, "99")

    monkeypatch.setattr(metadata, "version", version)
    found = by_name(list(doctor._versions()))
    assert found["mlflow"].state == FAIL
    assert "3.17.2" in found["mlflow"].remedy
    assert found["timm"].detail == "not installed"
    assert {found[name].state for name in ("ray", "torch", "python", "opencv-contrib-python-headless")} == {OK}


def test_a_store_that_cannot_be_written_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    found = by_name(list(doctor._store(ArtifactStore(str(tmp_path / "file" / "store")))))
    assert found["store"].state == FAIL


def test_an_address_without_a_cluster_fails_in_time() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    start = time.monotonic()
    (check,) = doctor._ray(doctor._ask_ray(address), None, [])
    assert check.state == FAIL
    assert address in check.detail
    assert time.monotonic() - start < 30


def test_uploads_and_statistics_that_are_turned_on_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {check.state for check in doctor._environment()} == {OK}
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "1")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    found = by_name(list(doctor._environment()))
    assert found["uv run"].state == found["usage statistics"].state == WARN
    assert "RAY_USAGE_STATS_ENABLED" in found["usage statistics"].detail


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken() -> None:
        raise OSError("no such device")

    monkeypatch.setattr(cluster, "memory_limit", broken)
    monkeypatch.setattr(doctor, "RAY_SECONDS", 0.01)
    checks = list(doctor.examine(ArtifactStore(str(tmp_path)), None, None))
    assert Check("memory", FAIL, "OSError: no such device", "see the message") in checks
    assert checks[-1].name == "ray cluster"
