"""One MLflow run for a pipeline run, and a nested run for every stage that is executed, with its inputs and output.

Only the driver talks to MLflow; workers report to the driver. What is told is written to a journal on this machine,
and a thread of its own sends it: nothing here waits for a server, and no result depends on it. May be used by several
threads at once, one for each stage that is running.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from pipeline.errors import StoreError
from pipeline.run.mirrors import Mirrors, StagePages
from pipeline.run.tracking import records
from pipeline.run.tracking.address import absolute_uri, masked
from pipeline.run.tracking.journal import Journal, are_there_leftovers
from pipeline.run.tracking.records import FINISHED, Record
from pipeline.run.tracking.sender import Sender
from pipeline.run.tracking.server import Server, TrackingAway, import_mlflow
from pipeline.store.uses import user_name

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact

ID_SECONDS = 10.0  # to wait for MLflow's id of a finished stage's run, once, while the server does not fail


class Tracker:
    """The MLflow side of one pipeline run. `start` imports MLflow.

    Args:
        uri: the tracking address; None: only the mirrors get anything.
        experiment: the pipeline's name.
        warn: takes a line for the user; called from other threads too.
        mirrors: name of a mirror -> folder or project.
    """

    def __init__(
        self, uri: str | None, experiment: str, warn: Callable[[str], None], mirrors: Mapping[str, str] | None = None
    ) -> None:
        self.mirrors = Mirrors(mirrors or {}, experiment, warn)
        self.uri = absolute_uri(uri) if uri else None
        self.experiment = experiment
        self.record_id: str | None = None  # our own id of the parent run; None when the run is not tracked
        self._warn = warn
        self._journal: Journal | None = None
        self._sender: Sender | None = None
        self._has_begun = self._is_closed = False
        self._guard = threading.Lock()

    def start(self, name: str, tags: Mapping[str, str], *, required: bool = False) -> None:
        """Open the parent run. Only the first call does anything.

        Raises:
            TrackingAway: with `required`, the run cannot be opened at the server.
        """
        with self._guard:
            if self._has_begun:
                return
            self._has_begun = True
            if self.uri is None:
                return
            server = Server(self.uri)
            try:
                self._journal = Journal.create(self.uri, self.experiment)
            except OSError as error:
                self._stop(error)
                if required:
                    raise TrackingAway(f"records of a run cannot be kept on this machine ({error})") from error
                return
            self.record_id = uuid.uuid4().hex
            self.tell(records.run_begins(self.record_id, name, _own_tags(name, tags), None))
            self._sender = Sender(server, self._journal, self._warn)
            if required:
                self._open_now(self._sender, server)
            import_mlflow()  # here: two threads that import large packages at once can meet half-made modules
            self._sender.start()

    def stage(self, name: str, tags: Mapping[str, str], settings: Mapping[str, Any]) -> StageTracker:
        """Open the nested run of one stage, with its settings as parameters."""
        pages = self.mirrors.open(name, settings)
        if self.record_id is None or not self.is_on:
            return StageTracker(self, pages, None)
        run = uuid.uuid4().hex
        self.tell(records.run_begins(run, name, _own_tags(name, tags), self.record_id))
        self.tell(records.parameters(run, settings))
        self.poke()
        return StageTracker(self, pages, run)

    def finish(self, status: str, metrics: Mapping[str, float]) -> None:
        """Close the parent run. Its metrics are the results of the stages, each called `stage.metric`.

        Waits for the server while records arrive, and for some seconds when none does.
        """
        if self._has_begun and metrics:
            results = self.mirrors.open("results", {})
            results.log_results(metrics)
            results.finish(status == FINISHED)
        if self.record_id is not None:
            if metrics:
                self.tell(records.metrics(self.record_id, metrics, 0))
            self.tell(records.run_ends(self.record_id, status))
        elif not self._has_begun and self.uri is not None and are_there_leftovers(self.uri):
            self._sender = Sender(Server(self.uri), None, self._warn)  # all was cached: there is time for old records
            self._sender.start()
        self._is_closed = True
        if self._sender is not None:
            self._sender.close()

    def tell(self, record: Record) -> None:
        """Write a record down. When the disk cannot take it, one warning says so, and tracking ends."""
        if self._journal is not None and self.is_on:
            try:
                self._journal.append(record)
            except OSError as error:
                self._stop(error)

    def tag(self, key: str, value: str) -> None:
        """Set a tag of the parent run."""
        if self.record_id is not None:
            self.tell(records.tag(self.record_id, key, value))

    def attach(self, name: str, data: bytes, run: str | None = None) -> None:
        """Give a run a file, such as a picture; the parent run where none is named."""
        run = run or self.record_id
        if self._journal is not None and run is not None and self.is_on:
            try:
                self.tell(records.upload(run, self._journal.keep_file(name, data)))
            except OSError as error:
                self._stop(error)

    def poke(self) -> None:
        """Have the records sent now, not with the next batch."""
        if self._sender is not None:
            self._sender.poke()

    @property
    def is_on(self) -> bool:
        """Whether what is told is still written down."""
        return self._journal is not None and not self._is_closed

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the parent run; None as long as the server has not given one."""
        return self.mlflow_id(self.record_id, 0.0)

    def mlflow_id(self, run: str | None, seconds: float | None = None) -> str | None:
        """MLflow's id of one of this run's runs; waits some seconds while the server does not fail."""
        if self._sender is None or run is None:
            return None
        return self._sender.wait_for_run(run, ID_SECONDS if seconds is None else seconds)

    def _open_now(self, sender: Sender, server: Server) -> None:
        try:
            sender.open()
        except Exception as error:
            assert self._journal is not None
            self._journal.close(delete=True)
            self._journal, self._sender, self.record_id = None, None, None
            raise TrackingAway(server.explain(error)) from error

    def _stop(self, error: OSError) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._warn(f"tracking ends here, its records cannot be kept ({error}); results are in the store as ever")


class StageTracker:
    """The nested run of one stage. Where the run is not tracked, only its mirrors get anything."""

    def __init__(self, tracker: Tracker, pages: StagePages, run: str | None) -> None:
        self._tracker, self._pages, self._run = tracker, pages, run
        self._inputs: dict[str, Artifact] = {}
        self._models: list[Artifact] = []

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, for which it waits some seconds while the server does not fail; None without one."""
        return self._tracker.mlflow_id(self._run)

    @property
    def reference(self) -> dict[str, str]:
        """Where to find the run: the address, MLflow's id when it is known, else the tag `tessera.record`."""
        if self._run is None or self._tracker.uri is None:
            return {}
        found = self.run_id
        return {"uri": masked(self._tracker.uri), **({"run": found} if found else {"record": self._run})}

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep metrics of one step; they are sent every two seconds."""
        self._pages.log_metrics(metrics, step)
        self._tell(lambda run: records.metrics(run, metrics, step))

    def log_inputs(self, inputs: Mapping[str, Artifact], sources: Mapping[str, tuple[str, str]]) -> None:
        """Say what the stage reads: artifacts as what their stage types say they are, sources as datasets.

        Args:
            inputs: dotted field path -> artifact.
            sources: dotted field path -> (address, content digest).
        """
        self._inputs, self._models = dict(inputs), records.models_read(inputs)
        models = [records.model_of(artifact, artifact.manifest.stage) for artifact in self._models]
        datasets = [
            records.dataset_of(artifact, path) for path, artifact in inputs.items() if not records.is_model(artifact)
        ]
        for path, (address, digest) in sources.items():
            datasets.append(records.dataset(f"source {path}", digest, address, path))
        if models or datasets:
            self._tell(lambda run: records.reads(run, datasets, models))

    def log_output(self, name: str, artifact: Artifact, tracked_as: str) -> None:
        """Say what the stage made, as its type's `tracked_as` has it, with its metrics and its preview.

        Its metrics are tied to the model that it makes or reads, and to the images that it reads.
        """
        manifest = artifact.manifest
        counts = {f"count.{key}": float(n) for key, n in manifest.counts.items()}
        picture = None
        with contextlib.suppress(StoreError):  # a result must not fail for its picture
            picture = artifact.read(manifest.preview) if manifest.preview else None
        self._pages.log_results({**manifest.metrics, **counts}, picture)
        if tracked_as == "model":
            self._tell(lambda run: records.makes(run, records.model_of(artifact, name)))
        else:
            self._tell(lambda run: records.reads(run, [records.dataset_of(artifact, "output")], []))
        if manifest.metrics:
            about = records.measured(artifact, self._inputs, self._models)
            self._tell(lambda run: records.metrics(run, manifest.metrics, 0, about))
        if counts:
            self._tell(lambda run: records.metrics(run, counts, 0))
        self._tell(lambda run: records.tag(run, "tessera.artifact", artifact.address))
        if picture is not None and manifest.preview and self._run is not None:
            self._tracker.attach(PurePosixPath(manifest.preview).name, picture, self._run)

    def finish(self, status: str) -> None:
        """Close the nested run."""
        self._pages.finish(status == FINISHED)
        self._tell(lambda run: records.run_ends(run, status))
        self._tracker.poke()

    def _tell(self, make: Callable[[str], Record]) -> None:
        if self._run is not None:
            self._tracker.tell(make(self._run))


def _own_tags(name: str, tags: Mapping[str, str]) -> dict[str, str]:
    own = {"mlflow.runName": name, "mlflow.user": user_name(), "mlflow.source.name": "tessera"}
    return {**own, **tags}
