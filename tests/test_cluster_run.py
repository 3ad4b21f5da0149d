"""The quickstart as a team would run it: submitted to a cluster of a head and two nodes with a token, its images and
artifacts in an object store, tracked by an MLflow server. The same run on this machine has the same fingerprints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.store.store import ArtifactStore
from tests.chaos.world import Service
from tests.cluster import Cluster, free_port, started_cluster

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(1200)]
ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
BUCKET = "team"
SECRET = "hunter2hunter2hunter2hunter2hunter2hunte"
KEYS = {"AWS_ACCESS_KEY_ID": "AKIAXYZZYXYZZYXYZZY0", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}
TRAININGS = ("warmup", "cotap")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("team")


@pytest.fixture(scope="module")
def bucket(folder: Path) -> Iterator[dict[str, str]]:
    """An S3 server with the quickstart's images; what its users have in their environment."""
    import boto3

    port = free_port()
    server = Service("s3", [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port, folder, {})
    server.start()
    try:
        environment = {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ALLOW_HTTP": "true"}
        client = boto3.client(
            "s3",
            endpoint_url=environment["AWS_ENDPOINT_URL"],
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )
        client.create_bucket(Bucket=BUCKET)
        source = ROOT / "configs" / "quickstart"
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            client.upload_file(str(file), BUCKET, f"photos/{file.relative_to(source)}")
        yield environment
    finally:
        server.kill()


@pytest.fixture(scope="module")
def tracking(folder: Path) -> Iterator[str]:
    """Address of an MLflow server."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination", "mlflow"]
    server = Service("mlflow", command, port, folder, {"MLFLOW_DISABLE_TELEMETRY": "true"})
    server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()


@pytest.fixture(scope="module")
def cluster(folder: Path, bucket: dict[str, str]) -> Iterator[Cluster]:
    """A head for the drivers and two nodes of one CPU for the work, each with a cache of its own."""
    caches = {number: {"TESSERA_CACHE": str(folder / f"cache-{number}")} for number in range(3)}
    environment = {**bucket, "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with started_cluster([0, 1, 1], environment, caches) as running:
        yield running


def tessera(*arguments: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert SECRET not in done.stdout + done.stderr
    return done.stdout


def submission(tracking: str) -> list[str]:
    """The quickstart with its addresses, and both trainings over both nodes."""
    changed = [f"tracking={tracking}", f"stages.images.source=s3://{BUCKET}/photos"]
    for name in TRAININGS:
        changed += [f"stages.{name}.resources.workers=2", f"stages.{name}.resources.cpus=1"]
        changed += [f"stages.{name}.loader_workers=0"]
    return [
        "submit",
        str(QUICKSTART),
        "--driver-cpus=0",
        f"--store=s3://{BUCKET}/store",
        *(f"--set={one}" for one in changed),
    ]


def test_a_submitted_quickstart_has_the_fingerprints_of_a_local_run(
    cluster: Cluster, bucket: dict[str, str], tracking: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in bucket.items():
        monkeypatch.setenv(name, value)
    here = {**cluster.tokens, "RAY_API_SERVER_ADDRESS": cluster.jobs_address}
    first = tessera(*submission(tracking), "--name", "first", environment=here).strip()
    second = tessera(*submission(tracking), "--name", "second", environment=here).strip()  # somebody else, at once
    for number in (1, 2):
        cluster.wait_for_worker("TrainWorker", number, seconds=600)
    for job in (first, second):
        wait(job, here)

    planned = json.loads(
        tessera("plan", str(QUICKSTART), f"--store={folder / 'local'}", "--set=tracking=null", "--json", environment={})
    )
    store = ArtifactStore(f"s3://{BUCKET}/store")
    made = {artifact.name: artifact for artifact in store.artifacts()}
    assert set(made) == {f"{stage['kind']}/{stage['fingerprint']}" for stage in planned["stages"]}
    verified = json.loads(tessera("artifacts", "verify", f"--store={store.address}", "--json", environment={}))
    assert verified == {"checked": len(planned["stages"]), "damaged": [], "notes": []}
    logs = {job: tessera("logs", job, environment=here) for job in (first, second)}
    for stage in planned["stages"]:
        computed = [job for job, text in logs.items() if f"{stage['name']}: done in" in text]
        assert len(computed) == 1, (stage["name"], logs)

    shown = tessera("status", "--json", environment=here) + details(cluster) + "".join(logs.values())
    shown += "".join(json.dumps(row) for row in tracked(tracking))
    assert len(tracked(tracking)) >= len(planned["stages"])
    kept = [found.path for found in store.objects.walk() if SECRET.encode() in (store.objects.get(found.path) or b"")]
    assert (SECRET in shown, cluster.token in shown, kept) == (False, False, [])


def test_submitted_again_it_ends_from_the_cache(cluster: Cluster, bucket: dict[str, str], tracking: str) -> None:
    here = {**cluster.tokens, "RAY_API_SERVER_ADDRESS": cluster.jobs_address, **bucket}
    job = tessera(*submission(tracking), "--wait", environment=here).strip()
    assert "all 9 stages are cached" in tessera("logs", job, environment=here)
    (status,) = json.loads(tessera("status", job, "--json", environment=here))
    assert status["ended"] - status["started"] < 60  # tests/benchmarks/nodes.py measures it on a quiet machine


def wait(job: str, here: dict[str, str], seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while (status := json.loads(tessera("status", job, "--json", environment=here))[0]["status"]) != "SUCCEEDED":
        assert status in ("PENDING", "RUNNING"), tessera("logs", job, environment=here)[-3000:]
        assert time.monotonic() < end, tessera("logs", job, environment=here)[-3000:]
        time.sleep(2)


def details(cluster: Cluster) -> str:
    """All that Ray's job server tells of the jobs, to anybody who has the token."""
    import urllib.request

    request = urllib.request.Request(
        f"{cluster.jobs_address}/api/jobs/", headers={"Authorization": f"Bearer {cluster.token}"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read().decode()


def tracked(tracking: str) -> list[dict[str, Any]]:
    """What MLflow's server keeps of every run."""
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=tracking)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return [run.to_dictionary() for run in client.search_runs(experiments, max_results=1000)]
