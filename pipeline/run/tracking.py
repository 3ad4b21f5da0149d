"""MLflow: one run for a pipeline run, and a nested run for every stage that is executed, with its inputs and output.

Only the driver talks to MLflow, through its client and an explicit URI; workers report to the driver. No result depends
on it: when MLflow cannot be reached, one warning says so and the run goes on without it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipeline.config import registry
from pipeline.errors import StoreError, TesseraError, UsageError
from pipeline.run.mirrors import Mirrors, StagePages
from pipeline.store.uses import user_name

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from pipeline.store.artifact import Artifact

PROBE_SECONDS = 3.0
FLUSH_SECONDS = 2.0  # metrics of a training loop are sent in batches: a call to a remote server takes milliseconds
FLUSH_COUNT = 500  # MLflow takes at most 1000 metrics a call
PARAMS_A_CALL, PARAM_LENGTH, KEY_LENGTH, DIGEST_LENGTH = 100, 500, 250, 36  # 6000, 250 and 36 are MLflow's limits
FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"

# Set unless the user has set them. MLflow's own defaults retry a dead server for many minutes.
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "GIT_PYTHON_REFRESH": "quiet",
}


class TrackingAway(TesseraError):
    """MLflow cannot be reached, and the run may not start without it."""


class Tracker:
    """The MLflow side of one pipeline run. No error of MLflow's fails the run: the first one ends the tracking.

    `start` imports MLflow. It creates a database file under a lock, so that runs that start together make only one.
    """

    def __init__(
        self, uri: str | None, experiment: str, warn: Callable[[str], None], mirrors: Mapping[str, str] | None = None
    ) -> None:
        self.mirrors = Mirrors(mirrors or {}, experiment, warn)
        self.uri = absolute_uri(uri) if uri else None
        self.experiment = experiment
        self.run_id: str | None = None
        self._warn = warn
        self._client: MlflowClient | None = None
        self._experiment_id = ""
        self._begun = False

    def start(self, name: str, tags: Mapping[str, str], *, required: bool = False) -> None:
        """Open the parent run. Only the first call does anything: a server that was away is not asked again.

        Raises:
            TrackingAway: with `required`, the run cannot be opened.
        """
        if self._begun:
            return
        self._begun = True
        if self.uri is None:
            return
        with self._must_answer() if required else self.guarded():
            self._client, self._experiment_id = _connect(self.uri, self.experiment)
            self.run_id = self._create_run(name, tags)

    def stage(self, name: str, tags: Mapping[str, str], settings: Mapping[str, Any]) -> StageTracker:
        """Open the nested run of one stage, with its settings as parameters."""
        run = StageTracker(self, self.mirrors.open(name, settings))
        if self._client is not None and self.run_id is not None:
            with self.guarded():
                run.run_id = self._create_run(name, {**tags, "mlflow.parentRunId": self.run_id})
            if run.run_id is not None:
                run.log_settings(settings)
        return run

    def finish(self, status: str, metrics: Mapping[str, float]) -> None:
        """Close the parent run. Its metrics are the results of the stages, each called `stage.metric`."""
        if self._begun and metrics:
            results = self.mirrors.open("results", {})
            results.log_results(metrics)
            results.finish(status == FINISHED)
        if self._client is not None and self.run_id is not None:
            with self.guarded() as client:
                client.log_batch(self.run_id, metrics=_metrics(metrics, 0))
                client.set_terminated(self.run_id, status)

    @contextlib.contextmanager
    def _must_answer(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._client = None
            raise TrackingAway(f"{masked(self.uri or '')} is away ({_reason(error)})") from error

    @contextlib.contextmanager
    def guarded(self) -> Iterator[MlflowClient]:
        """The client, for calls that may fail: the first failure is a warning, and ends the tracking of this run."""
        try:
            yield self._client
        except Exception as error:
            self._client = None
            self._warn(
                f"tracking at {masked(self.uri or '')} is away ({_reason(error)}); the run goes on untracked, "
                "its results are in the store"
            )

    @property
    def client(self) -> MlflowClient | None:
        """MLflow's client; None when this run is not tracked, and after an error."""
        return self._client

    @property
    def experiment_id(self) -> str:
        """The id of the experiment that the run belongs to; "" when it is not tracked."""
        return self._experiment_id

    def _create_run(self, name: str, tags: Mapping[str, str]) -> str:
        assert self._client is not None
        own = {"mlflow.runName": name, "mlflow.user": user_name(), "mlflow.source.name": "tessera"}
        return self._client.create_run(self._experiment_id, run_name=name, tags={**own, **tags}).info.run_id


class StageTracker:
    """The nested run of one stage. Where the run is not tracked, only its mirrors get anything."""

    def __init__(self, tracker: Tracker, pages: StagePages) -> None:
        self.run_id: str | None = None
        self._tracker, self._pages = tracker, pages
        self._waiting: list[Any] = []
        self._flushed = time.monotonic()

    def log_settings(self, settings: Mapping[str, Any]) -> None:
        """Log a stage's settings as MLflow's parameters."""
        from mlflow.entities import Param

        params = [Param(_key(key), value[:PARAM_LENGTH]) for key, value in flatten(settings).items()]
        with self._tracker.guarded() as client:
            for first in range(0, len(params), PARAMS_A_CALL):
                client.log_batch(self.run_id, params=params[first : first + PARAMS_A_CALL])

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep metrics of one step; they are sent every two seconds."""
        self._pages.log_metrics(metrics, step)
        if not self._live:
            return
        self._waiting += _metrics(metrics, step)
        if len(self._waiting) >= FLUSH_COUNT or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send the metrics that are waiting."""
        waiting, self._waiting = self._waiting, []
        self._flushed = time.monotonic()
        if waiting and self._live:
            with self._tracker.guarded() as client:
                for first in range(0, len(waiting), FLUSH_COUNT):
                    client.log_batch(self.run_id, metrics=waiting[first : first + FLUSH_COUNT])

    def log_inputs(self, inputs: Mapping[str, Artifact], sources: Mapping[str, tuple[str, str]]) -> None:
        """Say what the stage reads: artifacts as what their stage types say they are, sources as datasets.

        Args:
            inputs: dotted field path -> artifact.
            sources: dotted field path -> (address, content digest).
        """
        if not self._live:
            return
        from mlflow.entities import LoggedModelInput

        with self._tracker.guarded() as client:
            models, datasets = [], []
            for path, artifact in inputs.items():
                model = self._find_model(client, artifact) if _tracked_as(artifact) == "model" else None
                if model is not None:
                    models.append(LoggedModelInput(model))
                else:
                    datasets.append(_dataset(artifact, path))
            for path, (address, digest) in sources.items():
                datasets.append(_dataset_input(f"source {path}", digest, address, {}, path))
            if models or datasets:
                client.log_inputs(self.run_id, datasets=datasets, models=models)

    def log_output(self, name: str, artifact: Artifact, tracked_as: str) -> None:
        """Say what the stage made, as its type's `tracked_as` has it, with its metrics and its preview."""
        manifest = artifact.manifest
        results = {**manifest.metrics, **{f"count.{key}": float(n) for key, n in manifest.counts.items()}}
        picture = None
        with contextlib.suppress(StoreError):  # a result must not fail for its picture
            picture = artifact.read(manifest.preview) if manifest.preview else None
        self._pages.log_results(results, picture)
        if not self._live:
            return
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        with self._tracker.guarded() as client:
            if tracked_as == "model":
                model = client.create_logged_model(
                    self._tracker.experiment_id,
                    name=re.sub(r"[^\w.-]", "_", name),
                    source_run_id=self.run_id,
                    tags={"tessera.fingerprint": artifact.fingerprint, "tessera.address": artifact.address},
                    model_type=artifact.kind,
                )
                client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
                client.log_outputs(self.run_id, models=[LoggedModelOutput(model.model_id, 0)])
            else:
                client.log_inputs(self.run_id, datasets=[_dataset(artifact, "output")])
            client.log_batch(self.run_id, metrics=_metrics(results, 0))
            client.set_tag(self.run_id, "tessera.artifact", artifact.address)
            if manifest.preview and picture is not None:
                with tempfile.TemporaryDirectory() as folder:
                    file = Path(folder) / Path(manifest.preview).name
                    file.write_bytes(picture)
                    client.log_artifact(self.run_id, str(file))

    def finish(self, status: str) -> None:
        """Close the nested run."""
        self._pages.finish(status == FINISHED)
        self.flush()
        if self._live:
            with self._tracker.guarded() as client:
                client.set_terminated(self.run_id, status)

    def _find_model(self, client: MlflowClient, artifact: Artifact) -> str | None:
        found = client.search_logged_models(
            [self._tracker.experiment_id],
            filter_string=f"tags.`tessera.fingerprint` = '{artifact.fingerprint}'",
            max_results=1,
        )
        return found[0].model_id if found else None

    @property
    def _live(self) -> bool:
        return self.run_id is not None and self._tracker.client is not None


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


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


def masked(uri: str) -> str:
    """The address without the password it may hold."""
    return re.sub(r"(://[^:/@]+):[^@/]+@", r"\1:***@", uri)


def how_to_open(uri: str) -> str:
    """The command that shows the runs, or the address to open."""
    return masked(uri) if uri.startswith("http") else f"mlflow ui --backend-store-uri {masked(uri)}"


def database_file(uri: str) -> Path | None:
    """The file of an SQLite address; None for any other address."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted keys, as in `--set`; an empty list or mapping is a value."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{path}.")
        elif isinstance(value, list) and value and any(isinstance(item, Mapping) for item in value):
            flat |= flatten({str(i): item for i, item in enumerate(value)}, f"{path}.")
        else:
            flat[path] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def probe(uri: str) -> None:
    """Check that something listens at a server's address; MLflow itself would try again for a long time.

    Raises:
        OSError: nothing does.
    """
    if uri.startswith(("http://", "https://")):
        parts = urlsplit(uri)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=PROBE_SECONDS).close()


def _connect(uri: str, experiment: str) -> tuple[MlflowClient, str]:
    """A client and the id of the experiment; database and experiment are made once, by one process."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    probe(uri)
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    import mlflow
    from filelock import FileLock

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # its import sets INFO
    database = database_file(uri)
    if database is not None:
        database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{database}.lock") if database is not None else contextlib.nullcontext():
        client = mlflow.MlflowClient(uri)
        found = client.get_experiment_by_name(experiment)
        if found is not None:
            return client, found.experiment_id
        # A server knows where to keep pictures. With a database the place must be named, or it is the current folder.
        place = None if uri.startswith("http") else str((database or Path(".tessera/_")).absolute().parent / "mlflow")
        try:
            return client, client.create_experiment(experiment, artifact_location=place)
        except mlflow.MlflowException:  # another machine was faster at the same server
            found = client.get_experiment_by_name(experiment)
            if found is None:
                raise
            return client, found.experiment_id


def _tracked_as(artifact: Artifact) -> str:
    """What an artifact is in MLflow's terms; a dataset where its stage type is not installed here."""
    made_by = registry.stage_class(artifact.manifest.uses)
    return made_by.tracked_as if made_by is not None else "dataset"


def _dataset(artifact: Artifact, context: str) -> Any:
    profile = {"rows": artifact.rows, "files": len(artifact.manifest.files), "stage": artifact.manifest.stage}
    return _dataset_input(artifact.kind, artifact.fingerprint, artifact.address, profile, context)


def _dataset_input(name: str, digest: str, address: str, profile: Mapping[str, Any], context: str) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    scheme = address.split("://", 1)[0] if "://" in address else "local"
    source = json.dumps({"uri": address})
    dataset = Dataset(name, digest[:DIGEST_LENGTH], scheme, source, profile=json.dumps(profile))
    tags = [InputTag("mlflow.data.context", context), InputTag("tessera.fingerprint", digest)]
    return DatasetInput(dataset, tags)


def _metrics(metrics: Mapping[str, float], step: int) -> list[Any]:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    return [Metric(_key(key), float(value), now, step) for key, value in metrics.items()]


def _key(key: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", key)[:KEY_LENGTH]
