"""A pipeline made ready for another machine: one file, absolute addresses, no secret, and the command that runs it."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pipeline.config.load import load_pipeline
from pipeline.errors import ConfigError, UsageError
from pipeline.run.jobs.client import Job, Jobs
from pipeline.run.jobs.elsewhere import pipeline_text
from pipeline.run.jobs.submission import check_disks, make_submission

Write = Callable[..., Path]
PIPELINE = """
store: s3://bucket/tessera
tracking: null
stages:
  scenes: {uses: ingest, source: s3://bucket/scenes}
  slic: {uses: superpixels, images: scenes}
"""

pytestmark = pytest.mark.usefixtures("registered")


def test_paths_become_absolute_and_what_extends_and_set_say_is_written_out(write: Write, tmp_path: Path) -> None:
    write(
        "store: here\nstages:\n  scenes: {uses: ingest, source: photos}\n  slic: {uses: superpixels, images: scenes}",
        "a.yaml",
    )
    write("extends: a.yaml\ntracking: sqlite:///runs.db\nstages: {slic: {ratio: 0.25}}", "b.yaml")
    pipeline = load_pipeline(tmp_path / "b.yaml", ["stages.slic.region_size=16"])
    assert yaml.safe_load(pipeline_text(pipeline)) == {
        "name": "b",
        "store": f"{tmp_path}/here",
        "tracking": f"sqlite:///{tmp_path}/runs.db",
        "stages": {
            "scenes": {"uses": "ingest", "source": f"{tmp_path}/photos"},
            "slic": {"uses": "superpixels", "images": "scenes", "region_size": 16, "ratio": 0.25},
        },
    }


@pytest.mark.parametrize(
    ("old", "new", "path"),
    [
        ("tracking: null", "tracking: http://me:hunter2@mlflow:5000", "tracking"),
        ("s3://bucket/tessera", "s3://KEY:hunter2@bucket/tessera", "store"),
        ("s3://bucket/scenes", "s3://KEY:hunter2@bucket/scenes", "stages.scenes.source"),
    ],
)
def test_a_secret_in_an_address_is_refused_and_not_shown(write: Write, old: str, new: str, path: str) -> None:
    pipeline = load_pipeline(write(PIPELINE.replace(old, new), "p.yaml"))
    with pytest.raises(ConfigError, match="holds a secret") as caught:
        make_submission(pipeline)
    assert caught.value.problems[0].path == path
    assert "hunter2" not in str(caught.value)


def test_a_folder_of_this_machine_needs_nodes_that_see_it(write: Write) -> None:
    local = load_pipeline(write(PIPELINE.replace("s3://bucket/scenes", "photos"), "local.yaml"))
    check_disks(local, ["10.0.0.1", "127.0.0.2"], {"127.0.0.1", "10.0.0.1"})
    with pytest.raises(UsageError, match=r"stages\.scenes\.source .*photos.*10\.0\.0\.2.*--shared-disk"):
        check_disks(local, ["10.0.0.1", "10.0.0.2"], {"127.0.0.1", "10.0.0.1"})
    check_disks(load_pipeline(write(PIPELINE, "bucket.yaml")), ["10.0.0.2"], {"10.0.0.1"})


def test_a_path_in_the_home_is_that_of_the_submitter(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    text = PIPELINE.replace("s3://bucket/tessera", "~/store").replace("s3://bucket/scenes", "$HOME/scenes")
    sent = yaml.safe_load(pipeline_text(load_pipeline(write(text, "p.yaml"))))
    assert (sent["store"], sent["stages"]["scenes"]["source"]) == (f"{tmp_path}/store", f"{tmp_path}/scenes")


def test_variables_are_sent_by_name_and_a_missing_one_is_refused(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = load_pipeline(write(PIPELINE, "p.yaml"))
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    made = make_submission(pipeline, environment=["AWS_REGION", "LEVEL=a=b"])
    assert {name: made.environment[name] for name in ("AWS_REGION", "LEVEL")} == {
        "AWS_REGION": "eu-west-1",
        "LEVEL": "a=b",
    }
    with pytest.raises(UsageError, match="NOT_SET"):
        make_submission(pipeline, environment=["NOT_SET"])
    with pytest.raises(UsageError, match="NAME=VALUE"):
        make_submission(pipeline, environment=["9=x"])


def test_the_command_runs_the_named_python_or_the_first_that_exists(write: Write) -> None:
    pipeline = load_pipeline(write(PIPELINE, "p.yaml"))
    named = make_submission(pipeline, ["--only=slic"], python="echo")
    assert shlex.split(named.entrypoint) == ["exec", "echo", "start_tessera.py", "run", "p.yaml", "--only=slic"]
    shown = subprocess.run(named.entrypoint, shell=True, capture_output=True, text=True, check=True)
    assert shown.stdout == "start_tessera.py run p.yaml --only=slic\n"
    assert subprocess.run(["sh", "-n", "-c", make_submission(pipeline).entrypoint], check=False).returncode == 0


def test_a_job_that_a_new_head_does_not_know_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs.__new__(Jobs)

    def get(job_id: str) -> Job:
        raise UsageError(f"the cluster has no job {job_id}")

    monkeypatch.setattr(jobs, "get", get)
    assert jobs.wait("night-1").lost


def test_a_sweep_is_sent_as_its_pipeline_and_one_space_file(write: Write) -> None:
    pipeline = load_pipeline(write(PIPELINE, "p.yaml"))
    write("objective: j.m\ntrials: 4\nspace: {stages.slic.ratio: {uniform: [0, 1]}}", "base.yaml")
    made = make_submission(pipeline, space=write("extends: base.yaml\ntrials: 2", "s.yaml"), python="python3")
    assert shlex.split(made.entrypoint)[2:] == ["start_tessera.py", "sweep", "--space=space.yaml", "p.yaml"]
    sent = made.package.files["space.yaml"]
    assert isinstance(sent, str)
    assert yaml.safe_load(sent) == {
        "objective": "j.m",
        "trials": 2,
        "space": {"stages.slic.ratio": {"uniform": [0, 1]}},
    }
