"""Addresses of tracking servers and databases: how users write them, and how they are shown without a secret."""

from __future__ import annotations

import base64
import configparser
import os
import re
import socket
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.errors import UsageError

PROBE_SECONDS = 3.0
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
CREDENTIALS = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")  # environment variables of MLflow's


def absolute_uri(uri: str) -> str:
    """The tracking address, with a database file's path made absolute: then it means the same in any folder.

    Raises:
        UsageError: it is a file store, which MLflow 3 refuses.
    """
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    if "://" not in uri or uri.startswith("file:"):
        raise UsageError(
            f"tracking {uri}: MLflow keeps runs in a database or on a server (use sqlite:///PATH or http://)"
        )
    return uri


def masked(text: str) -> str:
    """An address, or a text with addresses in it, without the passwords they may hold."""
    return re.sub(r"(://[^:/@\s]+):[^@/\s]+@", r"\1:***@", text)


def anonymous(uri: str) -> str:
    """The address without user and password: what names the server, whoever asks it."""
    return re.sub(r"://[^/@\s]+@", "://", uri).rstrip("/")


def scrubbed(text: str, uri: str) -> str:
    """A text in one line, without the secrets that this process uses for a tracking address."""
    password = urlsplit(uri).password or "" if is_server(uri) else ""
    for secret in (password, unquote(password), *(os.environ.get(name, "") for name in SECRETS)):
        if len(secret) > 3:  # a shorter one would blank ordinary words
            text = text.replace(secret, "***")
    return masked(" ".join(text.split()))


def authorization(uri: str) -> str | None:
    """The value of the HTTP header that MLflow's client would send: by the address, the environment or its file."""
    parts = urlsplit(uri)
    if parts.username:
        return _basic(unquote(parts.username), unquote(parts.password or ""))
    file = configparser.ConfigParser()
    file.read(Path("~/.mlflow/credentials").expanduser())
    user, password = (
        os.environ.get(name) or file.get("mlflow", name.lower(), fallback=None, raw=True)
        for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    )
    if user and password:
        return _basic(user, password)
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return f"Bearer {token}" if token else None


def _basic(user: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


def is_server(uri: str) -> bool:
    """Whether it is a server's address, and not a database's."""
    return uri.startswith(("http://", "https://"))


def how_to_open(uri: str) -> str:
    """The command that shows the runs, or the address to open."""
    return masked(uri) if is_server(uri) else f"mlflow ui --backend-store-uri {masked(uri)}"


def database_file(uri: str) -> Path | None:
    """The file of an SQLite address; None for any other address."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def probe(uri: str) -> None:
    """Check that something listens at a server's address; MLflow itself would try again for a long time.

    Raises:
        OSError: nothing does.
    """
    parts = urlsplit(uri)
    port = parts.port or PORTS.get(parts.scheme.split("+")[0])
    if parts.hostname and port:
        socket.create_connection((parts.hostname, port), timeout=PROBE_SECONDS).close()
