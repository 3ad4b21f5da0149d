"""Everything that a run of the long test needs, each part a process that can be killed: a Ray cluster of two nodes, an
S3 server behind a gateway, an MLflow server on SQLite.

The S3 server keeps its objects in memory, so it is the gateway in front of it that is killed: for a run that is the
same as a server whose disk survives.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.cluster import Cluster, free_port
from tests.faults.runs import ROOT, Run

BUCKET = "tessera"
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_REGION": "us-east-1"}
# The quickstart with all of its stages, shortened; both trainings on Ray Train, the first over both nodes.
RECIPE = """
extends: {quickstart}
name: chaos
store: {store}
tracking: {tracking}
stages:
  images: {{source: s3://{bucket}/source}}
  warmup:
    epochs: 8
    log_every: 1
    checkpoint_every: 2
    loader_workers: 0
    resources: {{workers: 2, cpus: 1}}
  cotap:
    epochs: 4
    log_every: 1
    checkpoint_every: 2
    loader_workers: 0
    resources: {{workers: 1, cpus: 1}}
  segmentation: {{samples: 400}}
"""


class Service:
    """A server process that is killed and started again on the same port.

    Args:
        name: of its log file.
        command: to start it.
        port: it answers on.
        folder: for its log, and where it runs.
        environment: beside this process's.
    """

    def __init__(self, name: str, command: list[str], port: int, folder: Path, environment: dict[str, str]) -> None:
        self.name, self.command, self.port, self.folder = name, command, port, folder
        self.environment = environment
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, seconds: float = 120) -> None:
        """Start it and wait until it takes connections."""
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError(f"{self.name} does not start: see {self.folder / self.name}.log")

    def kill(self) -> None:
        """`kill -9` of it and all that it has started."""
        if self.process is None:
            return
        processes = [psutil.Process(self.process.pid)] if self.process.poll() is None else []
        for process in [*processes, *(child for one in processes for child in one.children(recursive=True))]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()
        self.process = None


class World:
    """The parts together. Drivers and nodes reach the store through the gateway, the test itself directly."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        server, gateway, tracking = free_port(), free_port(), free_port()
        python = sys.executable
        self.server = Service(
            "s3", [python, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(server)], server, folder, {}
        )
        here = {"PYTHONPATH": str(ROOT)}
        command = [python, "-m", "tests.chaos.gateway", str(gateway), str(server)]
        self.gateway = Service("gateway", command, gateway, folder, here)
        command = [python, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(tracking), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination", "mlflow"]
        # Without its job runner, which is eight processes more.
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.tracking = Service("mlflow", command, tracking, folder, quiet)
        self.direct = self._s3(server)
        self.environment = {
            **self._s3(gateway),
            "OMP_NUM_THREADS": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        caches = {number: {"TESSERA_CACHE": str(folder / f"cache-{number}")} for number in range(2)}
        self.cluster = Cluster([1, 1], self.environment, caches, dashboard=False)

    def _s3(self, port: int) -> dict[str, str]:
        return {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ALLOW_HTTP": "true"}

    def start(self) -> None:
        """Start every part, and put the images into the bucket."""
        for service in (self.server, self.gateway, self.tracking):
            service.start()
        self.cluster.start()
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=self.direct["AWS_ENDPOINT_URL"],
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket=BUCKET)
        source = ROOT / "configs" / "quickstart"
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            client.upload_file(str(file), BUCKET, f"source/{file.relative_to(source)}")

    def address(self, store: str) -> str:
        """Of a store in the bucket."""
        return f"s3://{BUCKET}/{store}"

    def drive(self, store: str) -> Run:
        """Start the recipe, or continue it: `tessera run` on the cluster, with this folder of the bucket as store."""
        config = self.folder / f"{store}.yaml"
        config.write_text(
            RECIPE.format(
                quickstart=ROOT / "configs" / "quickstart.yaml",
                bucket=BUCKET,
                store=self.address(store),
                tracking=f"http://127.0.0.1:{self.tracking.port}",
            )
        )
        environment = {
            **self.environment,
            **self.cluster.tokens,
            "TESSERA_CACHE": str(self.folder / "cache-driver"),
        }
        return Run(["run", str(config), "--address", self.cluster.address], environment, self.folder / f"{store}.log")

    def stop(self) -> None:
        """End every part."""
        self.cluster.stop()
        for service in (self.tracking, self.gateway, self.server):
            service.kill()
        for cache in self.folder.glob("cache-*"):
            shutil.rmtree(cache, ignore_errors=True)


@contextmanager
def started_world(folder: Path) -> Iterator[World]:
    """A running world; also this process's own S3 settings."""
    world = World(folder)
    os.environ.update(world.direct)
    try:
        world.start()
        yield world
    finally:
        world.stop()
