"""Ray as the runner starts it: it prints nothing, takes limited memory, and ends with its driver, also a killed one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.errors import ClusterError
from pipeline.run import cluster, head
from tests.pipeline.workshop import Workshop

ON_RAY = """
store: store
tracking: {tracking}
stages:
  numbers: {{uses: fake_numbers, source: numbers.txt}}
  scaled: {{uses: fake_on_ray, numbers: numbers}}
"""


def ray_processes(temp: Path) -> list[int]:
    """Ids of the Ray processes whose command line names the temporary folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(temp) in command and (b"raylet" in command or b"gcs_server" in command):
                found.append(int(entry.name))
    return found


@pytest.fixture
def short(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A temporary folder for Ray of this test's own, short enough for its sockets."""
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    workshop.extra["RAY_TMPDIR"] = str(folder)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_on_a_local_ray_leaves_nothing_behind(workshop: Workshop, short: Path) -> None:
    workshop.write(ON_RAY)
    shown = workshop.outside("run", "p.yaml")
    assert "on a local Ray with" in shown.stderr
    assert "Traceback" not in shown.stderr
    assert "INFO" not in shown.stderr
    (manifest,) = workshop.json("artifacts", "show", "scaled", "p.yaml")
    assert manifest["notes"]["cwd"] == str(workshop.folder)  # relative paths mean the same to a worker
    end = time.monotonic() + 15
    while ray_processes(short) and time.monotonic() < end:
        time.sleep(0.2)
    assert ray_processes(short) == []
    assert [path for path in short.rglob("session_*") if not path.is_symlink()] == []


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_driver_takes_its_ray_along(workshop: Workshop, short: Path) -> None:
    workshop.write(ON_RAY)
    workshop.hold.touch()
    process = workshop.start("run", "p.yaml")
    workshop.wait_for("scaled")
    end = time.monotonic() + 60
    while not ray_processes(short):
        assert time.monotonic() < end
        time.sleep(0.2)
    process.kill()
    process.communicate()
    end = time.monotonic() + 30
    while ray_processes(short):
        assert time.monotonic() < end, "Ray outlives its driver"
        time.sleep(0.2)
    workshop.hold.unlink()
    # The next run shows the user the error of the task in a worker as one sentence.
    shown = workshop.outside("run", "p.yaml", "--set", "stages.scaled.fail=no", code=1)
    assert "stage 'scaled' failed: worker says no (do better)\n" in shown.stderr
    assert "Traceback" not in shown.stderr


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_that_ray_gets_as_well_is_clean(
    workshop: Workshop, short: Path, sent: signal.Signals, code: int
) -> None:
    """A terminal sends Ctrl-C to the whole process group, and so does `timeout`."""
    workshop.write(ON_RAY)
    workshop.hold.touch()
    process = workshop.start("run", "p.yaml", group=True)
    workshop.wait_for("scaled")
    time.sleep(2)  # until it is in the task, or in the wait after it
    os.killpg(process.pid, sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert "stopped; what was finished is kept" in errors
    end = time.monotonic() + 30
    while ray_processes(short):
        assert time.monotonic() < end, "Ray outlives its driver"
        time.sleep(0.2)


FORK = (
    ON_RAY
    + """\
  other: {{uses: fake_on_ray, numbers: numbers, factor: 3}}
"""
)


@pytest.mark.ray
@pytest.mark.slow
def test_an_interrupt_ends_two_stages_that_run_side_by_side_on_ray(workshop: Workshop, short: Path) -> None:
    workshop.write(FORK)
    workshop.hold.touch()
    process = workshop.start("run", "p.yaml", group=True)
    for stage in ("scaled", "other"):
        workshop.wait_for(stage)
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "stopped; what was finished is kept" in errors
    assert list((workshop.folder / "store/.tessera/leases").rglob("*.json")) == []
    end = time.monotonic() + 30
    while ray_processes(short):
        assert time.monotonic() < end, "Ray outlives its driver"
        time.sleep(0.2)


IN_AN_ACTOR = """
from pipeline.run import cluster

joined = cluster.start("local")
import ray

@ray.remote(num_cpus=0)
class Trial:
    def run(self):
        from pipeline.config.load import load_pipeline
        from pipeline.plan.plan import make_plan
        from pipeline.run.display import RunDisplay
        from pipeline.run.runner import run
        from pipeline.store.store import ArtifactStore

        pipeline = load_pipeline("p.yaml")
        store = ArtifactStore(pipeline.store)
        with RunDisplay() as display:
            result = run(pipeline, make_plan(pipeline, store), store, display)
        return [stage.state for stage in result.stages], ray.is_initialized()

print(ray.get(Trial.remote().run.remote()))
cluster.stop(joined)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_inside_an_actor_uses_the_ray_that_is_there(workshop: Workshop, short: Path) -> None:
    workshop.write(FORK)
    shown = subprocess.run(
        [sys.executable, "-c", IN_AN_ACTOR],
        cwd=workshop.folder,
        env={**os.environ, **workshop.environment(), **workshop.extra},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert shown.stdout.splitlines()[-1:] == ["(['done', 'done', 'done'], True)"], shown.stderr
    assert sorted(workshop.ran) == ["numbers", "other", "scaled"]


def test_an_address_where_nobody_answers_fails_at_once(workshop: Workshop) -> None:
    workshop.write(ON_RAY)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    start = time.monotonic()
    shown = workshop.tessera("run", "p.yaml", "--address", address, code=1)
    assert time.monotonic() - start < 15
    assert f"no Ray cluster answers at {address}" in shown.stderr


def test_what_answers_but_is_no_ray_is_said_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "ANSWER_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"something answers at {address}, but not as the head .*port"):
            head.joinable(address)


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ("import sys; sys.exit('AuthenticationError: InvalidAuthToken')", "wants its token, and this process has no"),
        ("import sys; sys.exit('RpcError: no')", "cannot be joined: RpcError: no"),
        ('print(); print(\'{"ray_version": "2.9.3"}\')', "runs Ray 2.9.3, this process .*both must be the same"),
        ('print(); print(\'{"python_version": "3.8.1"}\')', "runs Python 3.8.1, this process 3"),
    ],
)
def test_a_cluster_that_refuses_or_does_not_fit(says: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setattr(head, "ASK", says)
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(ClusterError, match=message):
        head.joinable(f"127.0.0.1:{server.getsockname()[1]}")


@pytest.mark.parametrize("address", ["ray://head:10001", "http://head:8265", "head", ":6379", "head:port"])
def test_an_address_that_cannot_be_joined_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cluster.QUIET:
        monkeypatch.setenv(name, cluster.QUIET[name])
    with pytest.raises(ClusterError, match="host:port"):
        cluster.start(address)


@pytest.mark.parametrize(
    ("says", "tries"), [("The current node timed out during startup.", cluster.LOCAL_STARTS), ("no shared memory", 1)]
)
def test_a_ray_too_slow_to_come_up_is_started_again(says: str, tries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []

    def init(**options: object) -> None:
        starts.append(options)
        raise RuntimeError(says)

    # Not the real Ray: that one reads its token when it is imported, and a later test of this process needs it.
    monkeypatch.setitem(
        sys.modules, "ray", SimpleNamespace(init=init, shutdown=lambda: None, is_initialized=lambda: False)
    )
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(ClusterError, match=f"a local Ray does not start: RuntimeError: {says}"):
        cluster.start("local")
    assert len(starts) == tries


def test_a_temporary_folder_too_long_for_sockets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "x" * 60)
    with pytest.raises(ClusterError, match="RAY_TMPDIR"):
        cluster.temp_dir()
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/x")
    assert cluster.temp_dir() == Path(f"/tmp/x/tessera-{os.getuid()}")


def test_the_environment_stays_quiet_and_local_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*cluster.QUIET, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that the test's end restores what was there
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    cluster.prepare_environment()
    assert os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"
    assert "RAY_AUTH_MODE" not in os.environ
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    cluster.prepare_environment()
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_the_object_store_is_bounded() -> None:
    assert 0 < cluster.object_store_bytes() <= 2 << 30
    assert cluster.object_store_bytes() <= 0.3 * cluster.memory_limit()


def test_remains_of_killed_runs_are_cleared(tmp_path: Path) -> None:
    dead, alive = tmp_path / "session_x_999999999", tmp_path / f"session_x_{os.getpid()}"
    for session in (dead, alive):
        (session / "ray_spilled_objects_1").mkdir(parents=True)
        (session / "logs").mkdir()
    cluster._remove_remains(tmp_path)
    assert sorted(path.name for path in dead.iterdir()) == ["logs"]
    assert len(list(alive.iterdir())) == 2
    os.utime(dead, (1.0, 1.0))
    cluster._remove_remains(tmp_path)
    assert not dead.exists()
    assert alive.exists()
