"""Jobs on a head that really runs, with a token: submitted, watched, stopped, submitted again when they are lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from tests.pipeline.run.jobs.heads import TOKEN, Head, started_head
from tests.pipeline.workshop import Workshop

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with started_head(2, {}) as started:
        yield started


@pytest.fixture
def submitting(workshop: Workshop, head: Head) -> Workshop:
    """A workshop whose commands find the head and its token in the environment."""
    workshop.extra |= {"RAY_API_SERVER_ADDRESS": head.address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    return workshop


def submit(workshop: Workshop, *options: str) -> list[str]:
    """The command line: the fakes find their log and what holds them by variables."""
    return ["submit", "p.yaml", *(f"--env={name}" for name in workshop.environment() if name != "PYTHONPATH"), *options]


def test_a_submitted_run_computes_then_ends_from_the_cache(submitting: Workshop) -> None:
    first = submitting.outside(*submit(submitting, "--follow"))
    assert submitting.ran == ["numbers", "scaled", "encoder", "score"]
    assert "score" in first.stdout
    assert "succeeded" in first.stderr
    assert TOKEN not in first.stdout + first.stderr
    start = time.monotonic()
    again = submitting.outside(*submit(submitting, "--wait", "--name", "again"))
    assert time.monotonic() - start < 60
    assert submitting.ran == ["numbers", "scaled", "encoder", "score"]
    job_id = again.stdout.strip()
    assert job_id.startswith("again-")
    assert "all 4 stages are cached" in submitting.outside("logs", job_id).stdout
    (listed,) = [job for job in json.loads(submitting.outside("status", "--json").stdout) if job["id"] == job_id]
    assert (listed["status"], listed["pipeline"], listed["exit_code"]) == ("SUCCEEDED", "p", 0)


def test_a_run_goes_on_without_its_submitter_until_it_is_stopped(submitting: Workshop) -> None:
    submitting.hold.touch()
    job_id = submitting.outside(*submit(submitting)).stdout.strip()
    submitting.wait_for("numbers")
    assert json.loads(submitting.outside("status", job_id, "--json").stdout)[0]["status"] == "RUNNING"
    assert "stopping" in submitting.outside("stop", job_id).stdout
    end = time.monotonic() + 60
    while (state := json.loads(submitting.outside("status", job_id, "--json").stdout)[0]["status"]) != "STOPPED":
        assert time.monotonic() < end, state
    submitting.hold.unlink()
    submitting.outside(*submit(submitting, "--wait"))
    assert submitting.states("plan", "p.yaml") == dict.fromkeys(("numbers", "scaled", "encoder", "score"), "cached")


def test_a_lost_driver_is_submitted_again(submitting: Workshop) -> None:
    submitting.hold.touch()
    submitter = submitting.start(*submit(submitting, "--retries=1"))
    submitting.wait_for("numbers")
    (driver,) = [
        process
        for process in psutil.process_iter(["cmdline"])
        if "start_tessera.py" in (process.info["cmdline"] or ())
        and process.environ().get("TESSERA_FAKES_HOLD") == str(submitting.hold)
    ]
    submitting.hold.unlink()
    driver.send_signal(signal.SIGKILL)
    output, errors = submitter.communicate(timeout=300)
    assert submitter.returncode == 0, output + errors
    assert "was lost" in errors
    assert "submitted again" in errors
    assert submitting.states("plan", "p.yaml") == dict.fromkeys(("numbers", "scaled", "encoder", "score"), "cached")


def test_a_failed_stage_is_not_tried_again_and_its_exit_code_comes_back(submitting: Workshop) -> None:
    (submitting.folder / "numbers.txt").write_text("no number\n")
    shown = submitting.outside(*submit(submitting, "--retries=2"), code=1)
    assert "was lost" not in shown.stderr
    assert "tessera logs" in shown.stderr


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"RAY_AUTH_TOKEN": "f" * 64}, 1, "refuses the token"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "", "HOME": "/nowhere"}, 1, "asks for a token"),
        ({"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}, 1, "no job server answers"),
        ({"RAY_API_SERVER_ADDRESS": "127.0.0.1:6379"}, 2, "http://HOST:8265"),
        ({"RAY_API_SERVER_ADDRESS": ""}, 2, "--address http://HOST:8265"),
    ],
)
def test_what_is_wrong_with_an_address_is_one_line(
    submitting: Workshop, change: dict[str, str], code: int, words: str
) -> None:
    submitting.extra |= change
    shown = submitting.outside("status", code=code)
    assert words in shown.stderr
    assert len(shown.stderr.strip().split("\n")) == 1


class WithoutAgent(BaseHTTPRequestHandler):
    """A job server whose head has no agent: it has every package, and starts no job."""

    def do_GET(self) -> None:
        self._answer(200, json.dumps({"version": "4", "ray_version": "2.60.0", "ray_commit": "x"}))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(500, "No available agent to submit job, please try again later.")

    def _answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        return


SUBMITTING = """
import sys
from pathlib import Path
from pipeline.errors import ClusterError
from pipeline.run.jobs import client
client.AGENT_SECONDS = 1.5
try:
    client.Jobs(sys.argv[1]).submit(Path(sys.argv[2]), "true", "job-1", "p", 1, {})
except ClusterError as error:
    print(error)
"""


def test_an_agent_that_never_comes_is_said_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("stages: {}")
    with ThreadingHTTPServer(("127.0.0.1", 0), WithoutAgent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        # In a process of its own: Ray reads what it knows of tokens when it is imported.
        command = [sys.executable, "-c", SUBMITTING, f"http://127.0.0.1:{server.server_port}", str(tmp_path)]
        said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        server.shutdown()
    assert "no agent that starts jobs" in said
    assert "--dashboard-agent-listen-port=0" in said
