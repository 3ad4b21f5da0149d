"""One tracking server or database: how it is reached, and what its errors mean for the records that wait."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import TesseraError
from pipeline.run.tracking.address import CREDENTIALS, database_file, is_server, masked, probe, scrubbed

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Set unless the user has set them. What MLflow's own defaults would try again for many minutes is tried by us.
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # a password may stand in it
    "GIT_PYTHON_REFRESH": "quiet",
}
REASON_LENGTH = 300

Failure = Literal[
    "away",  # it may be back later
    "refused",  # it does not let this user do it
    "rejected",  # it will never take this record
]


class TrackingAway(TesseraError):
    """MLflow cannot be reached, or does not let us in, and the run may not start without it."""


# How SQLAlchemy begins an error of the database itself. MLflow passes it on as if the request had been wrong.
DATABASE_FAILED = re.compile(r"\((?:\w+\.)*(?:OperationalError|DatabaseError|InterfaceError)\)")


class Server:
    """MLflow at one address. Nothing is asked before it is needed. Not thread-safe: one thread talks to it."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._client: MlflowClient | None = None
        self._experiments: dict[str, str] = {}

    def client(self) -> MlflowClient:
        """MLflow's client. Every call may fail; `failure` says what that means."""
        if self._client is None:
            probe(self.uri)
            import_mlflow()
            import mlflow

            with self._locked():  # it makes the tables of a new database, and two at once would leave it half-made
                self._client = mlflow.MlflowClient(self.uri)
        return self._client

    def experiment(self, name: str) -> str:
        """The id of an experiment; database and experiment are made once, by one process."""
        if name not in self._experiments:
            self._experiments[name] = self._find_experiment(name)
        return self._experiments[name]

    def _find_experiment(self, name: str) -> str:
        client, database = self.client(), database_file(self.uri)
        with self._locked():
            found = client.get_experiment_by_name(name)
            if found is not None:
                return str(found.experiment_id)
            # A server knows where to keep pictures. With a database the place must be named, or it is the current
            # folder.
            place = str((database or Path(".tessera/_")).absolute().parent / "mlflow")
            from mlflow import MlflowException

            try:
                made = client.create_experiment(name, artifact_location=None if is_server(self.uri) else place)
                return str(made)
            except MlflowException:  # another machine was faster at the same server
                found = client.get_experiment_by_name(name)
                if found is None:
                    raise
                return str(found.experiment_id)

    def _locked(self) -> contextlib.AbstractContextManager[Any]:
        """Of a database file: one process of this machine at a time. Not to be nested."""
        from filelock import FileLock

        database = database_file(self.uri)
        if database is None:
            return contextlib.nullcontext()
        database.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{database}.lock")

    def failure(self, error: Exception) -> Failure:
        """What an error of the client's means."""
        import sys

        if "mlflow" not in sys.modules:  # not even the port was open
            return "away"
        from mlflow.exceptions import MlflowException, RestException

        if not isinstance(error, MlflowException):
            return "away"
        if error.error_code in ("UNAUTHENTICATED", "PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED"):
            return "refused"
        if DATABASE_FAILED.search(str(error)):
            return "away"
        # Only MLflow itself answers with JSON: a proxy whose server is restarting may also say 404.
        its_own = isinstance(error, RestException) or not is_server(self.uri)
        return "rejected" if its_own and error.get_http_status_code() in (400, 404, 409) else "away"

    def explain(self, error: Exception) -> str:
        """The address, what went wrong there, and the remedy where there is one; without any secret."""
        what = self.failure(error)
        shown = masked(self.uri)
        if what == "away":
            return f"{shown} is away ({self.reason(error)})"
        if what == "rejected":
            return f"{shown} does not take a record ({self.reason(error)})"
        if getattr(error, "error_code", "") == "PERMISSION_DENIED":
            return f"{shown} does not let this user write (ask for a permission there, or {CREDENTIALS})"
        return f"{shown} refuses the user or the password ({CREDENTIALS})"

    def reason(self, error: Exception) -> str:
        """An error in one line, without any secret."""
        return scrubbed(f"{type(error).__name__}: {error}", self.uri)[:REASON_LENGTH]


def import_mlflow() -> None:
    """Import MLflow so that it neither calls home nor prints."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    import mlflow  # noqa: F401

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # its import sets INFO
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it warns of every try
