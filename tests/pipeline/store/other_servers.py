"""A server that answers as Google's and Azure's object storage do, as far as conditional writes need it.

Written after their documentation: pip has no emulator of either that keeps these conditions. It knows PUT, GET, HEAD
and DELETE of whole objects and Azure's batch of deletions; it checks no signature, and lists nothing.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def other_server() -> Iterator[str]:
    """Start the server; its http:// address."""
    objects: dict[str, tuple[bytes, int]] = {}  # by path: content and generation
    lock = threading.Lock()
    generations = iter(range(1, 1_000_000))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                found = objects.get(self.path)
                refused = self.refusal(found[1] if found else None)
                if refused:
                    return self.answer(refused)
                objects[self.path] = body, next(generations)
                return self.answer(201, generation=objects[self.path][1])

        def refusal(self, generation: int | None) -> int | None:
            """The status of a write whose condition does not hold; None where it does."""
            if (expected := self.headers.get("x-goog-if-generation-match")) is not None:
                return 412 if int(expected) != (generation or 0) else None
            if self.headers.get("If-None-Match") == "*" and generation is not None:
                return 409  # Azure's BlobAlreadyExists
            expected = self.headers.get("If-Match")
            return 412 if expected is not None and expected != f'"{generation}"' else None

        def do_GET(self) -> None:
            with lock:
                found = objects.get(self.path)
            if found is None:
                return self.answer(404)
            return self.answer(200, found[0], found[1])

        do_HEAD = do_GET  # noqa: N815 - http.server's name

        def do_DELETE(self) -> None:
            with lock:
                gone = objects.pop(self.path, None)
            self.answer(204 if gone else 404)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            parts = []
            for number, path in enumerate(re.findall(r"^DELETE (\S+) HTTP", body, re.MULTILINE)):
                with lock:
                    gone = objects.pop(path, None)
                status = "202 Accepted" if gone else "404 The specified blob does not exist."
                parts.append(
                    "--batch\r\nContent-Type: application/http\r\n"
                    f"Content-ID: {number}\r\n\r\nHTTP/1.1 {status}\r\nx-ms-version: 2023-11-03\r\n\r\n\r\n"
                )
            data = ("".join(parts) + "--batch--\r\n").encode()
            self.send_response(202)
            self.send_header("Content-Type", "multipart/mixed; boundary=batch")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def answer(self, status: int, data: bytes = b"", generation: int = 0) -> None:
            self.send_response(status)
            if generation:
                self.send_header("ETag", f'"{generation}"')
                self.send_header("x-goog-generation", str(generation))
                self.send_header("Last-Modified", formatdate(usegmt=True))
            if status != 204:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
