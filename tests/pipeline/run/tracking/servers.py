"""A real `mlflow server` with its auth app, in a process of its own; a PostgreSQL for it; a proxy that misbehaves."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

USER, PASSWORD = "admin", "correct-horse-battery"
READY_SECONDS = 150.0


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@dataclass
class MlflowServer:
    """`mlflow server` on a loopback port; `kill` and `start` as often as wanted, with the same database."""

    folder: Path
    backend: str  # address of the database
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def with_password(self) -> str:
        return f"http://{USER}:{PASSWORD}@127.0.0.1:{self.port}"

    def start(self, *, wait: bool = True) -> None:
        config = self.folder / "auth.ini"
        config.write_text(
            f"[mlflow]\ndefault_permission = NO_PERMISSIONS\ndatabase_uri = sqlite:///{self.folder}/auth.db\n"
            f"admin_username = {USER}\nadmin_password = {PASSWORD}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1", "--backend-store-uri", self.backend]
        command += ["--artifacts-destination", str(self.folder / "files")]
        quiet = {
            "MLFLOW_AUTH_CONFIG_PATH": str(config),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "for tests only",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        log = (self.folder / "server.log").open("ab")
        self.process = subprocess.Popen(command, env={**os.environ, **quiet}, stdout=log, stderr=log)
        log.close()
        if wait:
            self.wait()

    def wait(self) -> None:
        end = time.monotonic() + READY_SECONDS
        while time.monotonic() < end:
            assert self.process is not None
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            with contextlib.suppress(OSError, urllib.error.URLError):
                urllib.request.urlopen(f"{self.address}/health", timeout=2).close()
                return
            time.sleep(0.1)
        raise AssertionError((self.folder / "server.log").read_text())

    def kill(self) -> None:
        """Kill -9, with the processes that it has started."""
        if self.process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*psutil.Process(self.process.pid).children(recursive=True)]:
                process.kill()
        self.process.kill()
        self.process.wait()
        self.process = None

    def client(self) -> Any:
        """MLflow's own client, as the administrator."""
        import mlflow

        return mlflow.MlflowClient(self.with_password)


@contextlib.contextmanager
def mlflow_server(folder: Path, backend: str | None = None) -> Iterator[MlflowServer]:
    server = MlflowServer(folder, backend or f"sqlite:///{folder}/server.db")
    try:
        server.start()
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL on a loopback port, as a user that is not root, and its address for SQLAlchemy."""
    found = shutil.which("initdb") or next(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), None)
    if found is None:
        pytest.skip("PostgreSQL (initdb, postgres) is not installed")
    as_user: list[str] = []
    if os.getuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("PostgreSQL refuses root, and setpriv is not installed")
        as_user = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
    data, port = Path(tempfile.mkdtemp(prefix="tessera-postgres-")), free_port()  # pytest's folders are root's only
    if as_user:
        shutil.chown(data, "nobody", "nogroup")
    initdb = [*as_user, found, "-D", str(data), "-U", "tessera", "--auth=trust", "--no-sync", "-E", "UTF8"]
    subprocess.run(initdb, check=True, capture_output=True, cwd="/")
    command = [*as_user, str(Path(found).with_name("postgres")), "-D", str(data), "-p", str(port)]
    command += ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")
    try:
        end = time.monotonic() + 60
        while True:
            import psycopg2

            try:
                psycopg2.connect(host="127.0.0.1", port=port, user="tessera", dbname="postgres").close()
                break
            except psycopg2.OperationalError:
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.1)
        yield f"postgresql+psycopg2://tessera@127.0.0.1:{port}/postgres"
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(data, ignore_errors=True)


class Proxy(socketserver.ThreadingTCPServer):
    """Stands before a server. `mode`: "pass", "503", "hang" (accepts and never answers), "lose" (the server gets the
    request, the client never its answer). A connection serves one request.
    """

    allow_reuse_address = daemon_threads = True

    def __init__(self, target: int) -> None:
        self.target, self.mode, self.requests = target, "pass", 0
        self.closing = threading.Event()
        super().__init__(("127.0.0.1", 0), Passer)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def close(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


class Passer(socketserver.BaseRequestHandler):
    """One connection of the proxy."""

    server: Proxy

    def handle(self) -> None:
        request = self._message(self.request)
        if not request:
            return
        self.server.requests += 1
        mode = self.server.mode
        if mode == "hang":
            self.server.closing.wait(60)
        elif mode == "503":
            body = b"<html>try later</html>"
            self.request.sendall(
                b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Type: text/html\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
        else:
            with socket.create_connection(("127.0.0.1", self.server.target), timeout=30) as upstream:
                head, _, body = request.partition(b"\r\n\r\n")
                lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
                upstream.sendall(b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n" + body)
                answer = b"".join(iter(lambda: upstream.recv(65536), b""))
            if mode == "pass":
                self.request.sendall(answer)

    @staticmethod
    def _message(connection: socket.socket) -> bytes:
        """One HTTP request, head and body."""
        data = b""
        while b"\r\n\r\n" not in data:
            if not (more := connection.recv(65536)):
                return b""
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        lengths = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
        while len(body) < (int(lengths[0]) if lengths else 0):
            if not (more := connection.recv(65536)):
                return b""
            body += more
        return head + b"\r\n\r\n" + body


def everything_below(folder: Path) -> str:
    return "".join(
        file.read_text(errors="ignore") for file in folder.rglob("*") if file.is_file() and file.name != "p.yaml"
    )
