"""A proxy in front of an S3 server that misbehaves as servers and networks do, after a plan that a test chooses.

It reads a whole request, asks the plan what to do with it, and does that. What it did is counted, so that a test can
check that the faults it is about really happened.
"""

from __future__ import annotations

import http.client
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
INTERNAL = b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"
NOT_FORWARDED = ("slow down", "internal error", "cut upload")  # the server behind never sees such a request
FORWARDED = ("lost answer", "error after success", "cut download")  # it has done what was asked
FAULTS = (*NOT_FORWARDED, *FORWARDED, "delay")


@dataclass(frozen=True)
class Request:
    """What a plan sees of a request."""

    method: str
    path: str  # with bucket and query
    nth: int  # how often this method and path came before


Plan = Callable[[Request], str | None]  # the fault to show, or None


def nothing(request: Request) -> str | None:
    """The plan without a fault."""
    return None


def at_random(seed: int, share: float, faults: tuple[str, ...] = FAULTS, in_a_row: int = 3) -> Plan:
    """A plan by chance: the same for the same requests, in whatever order they come.

    Args:
        seed: of the chance.
        share: of the requests that meet a fault.
        faults: to choose from.
        in_a_row: the same request meets no more faults than this.
    """

    def plan(request: Request) -> str | None:
        chance = random.Random(f"{seed} {request.method} {request.path} {request.nth}")
        return chance.choice(faults) if request.nth % (in_a_row + 1) < in_a_row and chance.random() < share else None

    return plan


def each(fault: str) -> Plan:
    """A plan that shows `fault` once to every method and path."""
    return lambda request: fault if request.nth == 0 else None


def always(fault: str) -> Plan:
    """A plan that shows nothing else."""
    return lambda request: fault


def first(times: int, fault: str, method: str, part: str = "") -> Plan:
    """A plan that shows `fault` to the first requests of a method whose path holds `part`."""
    left = [times]

    def plan(request: Request) -> str | None:
        if request.method != method or part not in request.path or not left[0]:
            return None
        left[0] -= 1
        return fault

    return plan


@dataclass
class FaultyProxy:
    """A running proxy."""

    address: str
    plan: Plan = nothing
    shown: Counter[str] = field(default_factory=Counter)  # faults
    requests: Counter[tuple[str, str]] = field(default_factory=Counter)  # by method and path
    ranges: list[tuple[str, str]] = field(default_factory=list)  # (path, "bytes=...") of requests for a part
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def decide(self, method: str, path: str) -> str | None:
        """The fault for a request, which is counted."""
        path = re.sub(r"uploadId=[^&]+", "uploadId=*", path)  # another one in every run
        with self._lock:
            fault = self.plan(Request(method, path, self.requests[method, path]))
            self.requests[method, path] += 1
            if fault is not None:
                self.shown[fault] += 1
        return fault


@contextmanager
def faulty_proxy(target: str) -> Iterator[FaultyProxy]:
    """Start a proxy in front of the server at `target`, an http:// address, and end it."""
    host, port = urlsplit(target).hostname or "", urlsplit(target).port or 80

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)

        def log_message(self, format: str, *args: object) -> None:
            pass

        def handle_any(self) -> None:
            fault = proxy.decide(self.command, self.path)
            size = int(self.headers.get("Content-Length") or 0)
            if fault == "delay":
                time.sleep(0.3)
            if fault == "cut upload":
                self.rfile.read(size // 2)
                return self.cut()
            body = self.rfile.read(size)
            if part := self.headers.get("Range"):
                proxy.ranges.append((self.path, part))
            if fault == "slow down":
                return self.answer(503, "Slow Down", [], SLOW_DOWN)
            if fault == "internal error":
                return self.answer(500, "Internal Server Error", [], INTERNAL)
            behind = http.client.HTTPConnection(host, port, timeout=60)
            try:
                behind.request(self.command, self.path, body, dict(self.headers.items()))
                got = behind.getresponse()
                data = got.read()
            finally:
                behind.close()
            if fault == "lost answer":
                return self.cut()
            if fault == "error after success":
                return self.answer(500, "Internal Server Error", [], INTERNAL)
            return self.answer(got.status, got.reason, got.getheaders(), data, half=fault == "cut download")

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815 - http.server's names

        def answer(
            self, status: int, reason: str, headers: list[tuple[str, str]], data: bytes, half: bool = False
        ) -> None:
            self.send_response_only(status, reason)
            for name, value in headers:
                if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(name, value)
            length = {name.lower(): value for name, value in headers}.get("content-length", str(len(data)))
            if status != 204:
                self.send_header("Content-Length", length if self.command == "HEAD" else str(len(data)))
            self.end_headers()
            if half:
                self.wfile.write(data[: len(data) // 2])
                return self.cut()
            if self.command != "HEAD":
                self.wfile.write(data)
            return None

        def cut(self) -> None:
            self.wfile.flush()
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

        def handle(self) -> None:
            with suppress(OSError):  # the client may go at any moment
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy = FaultyProxy(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
