"""Sends the records of one journal to a server: in order, and so that what is sent twice is there once.

MLflow keeps a metric once for each name, time, step and value; parameters, tags, datasets and ends are the same when
they are said again. Runs and models, which it names itself, carry our own name as a tag by which they are found again.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

from pipeline.run.tracking.journal import Journal
from pipeline.run.tracking.records import DIGEST_LENGTH, KILLED, Record, may_be_tied
from pipeline.run.tracking.server import Server

RECORD_TAG, FINGERPRINT_TAG = "tessera.record", "tessera.fingerprint"
METRICS_A_CALL, PARAMS_A_CALL = 500, 100  # MLflow takes at most 1000 metrics and 100 parameters a call


class Delivery:
    """One journal on its way to a server.

    Args:
        journal: whose records.
        server: where to.
        rejected: told in one line of a record that the server will never take; it is left out.
        resumed: another process may have sent the first records already.
    """

    def __init__(
        self, journal: Journal, server: Server, rejected: Callable[[str], None], *, resumed: bool = False
    ) -> None:
        self.journal, self._server, self._rejected = journal, server, rejected
        self._runs, self._models = journal.ids["runs"], journal.ids["models"]
        self._is_unsure = resumed  # a run may be there whose id we never got
        self._perhaps_double: set[str] = set()
        self._waiting: dict[str, list[Any]] = defaultdict(list)  # run -> metrics of the records just read

    def send_some(self) -> int:
        """Send the next records; returns how many bytes of records that were.

        Raises:
            Exception: whatever the client raises; nothing is lost then, and the same records are sent again.
        """
        records, position = self.journal.read()
        sent = position - self.journal.position
        self._waiting.clear()
        try:
            for record in records:
                if record["op"] == "metrics":
                    self._gather(record)
                else:
                    self._flush(record.get("run", ""))
                    self._take(record)
            for run in list(self._waiting):
                self._flush(run)
        except Exception:
            self._is_unsure = True
            raise
        if sent:
            self.journal.note_sent(position)
        return sent

    def close_killed(self) -> None:
        """Close the runs of a killed process, which has written no end of them, at the time of its last record."""
        unfinished, last = self.journal.unfinished()
        for run in unfinished:
            if run in self._runs:
                end = {"run": run, "status": KILLED, "at": last}
                self._do(partial(self._end, end))

    def _take(self, record: Record) -> None:
        if record["op"] != "run" and record["run"] not in self._runs:
            return  # the server has rejected the run itself
        self._do(lambda: getattr(self, f"_{record['op']}")(record))

    def _do(self, call: Callable[[], Any]) -> None:
        """Make a call; a record that can never be sent must not stop all that follow."""
        try:
            call()
        except Exception as error:
            if self._server.failure(error) != "rejected":
                raise
            self._rejected(self._server.explain(error))

    def _run(self, record: Record) -> None:
        run = record["run"]
        if run in self._runs:
            return
        client, experiment = self._server.client(), self._server.experiment(self.journal.about["experiment"])
        tags = {**record["tags"], RECORD_TAG: run}
        if record["parent"] in self._runs:
            tags["mlflow.parentRunId"] = self._runs[record["parent"]]
        found = self._search(run) if self._is_unsure else []
        if self._is_unsure:
            self._perhaps_double.add(run)  # the answer to an earlier try may have been lost, and the try still come in
        if not found:
            made = client.create_run(experiment, start_time=record["at"], run_name=record["name"], tags=tags)
            found = [made.info.run_id]
        self.journal.note_sent(self.journal.position, runs={run: found[0]})

    def _search(self, run: str) -> list[str]:
        experiment = self._server.experiment(self.journal.about["experiment"])
        runs = self._server.client().search_runs([experiment], f"tags.`{RECORD_TAG}` = '{run}'", max_results=10)
        return [found.info.run_id for found in runs]

    def _params(self, record: Record) -> None:
        from mlflow.entities import Param

        params = [Param(key, value) for key, value in record["values"].items()]
        for first in range(0, len(params), PARAMS_A_CALL):
            batch = params[first : first + PARAMS_A_CALL]
            self._server.client().log_batch(self._runs[record["run"]], params=batch)

    def _gather(self, record: Record) -> None:
        from mlflow.entities import Metric

        model = self._models.get(record.get("model", ""))
        name, digest = record.get("dataset", (None, None)) if model else (None, None)
        for key, value in record["values"].items():
            about = (model, name, digest) if may_be_tied(value) else (None, None, None)
            self._waiting[record["run"]].append(Metric(key, value, record["at"], record["step"], *about))

    def _flush(self, run: str) -> None:
        metrics = self._waiting.pop(run, [])
        if run not in self._runs:
            return
        for first in range(0, len(metrics), METRICS_A_CALL):
            batch = metrics[first : first + METRICS_A_CALL]
            self._do(partial(self._server.client().log_batch, self._runs[run], metrics=batch))

    def _inputs(self, record: Record) -> None:
        from mlflow.entities import LoggedModelInput

        models = [LoggedModelInput(self._model(model, None)) for model in record["models"]]
        datasets = [_dataset(dataset) for dataset in record["datasets"]]
        if models or datasets:
            self._server.client().log_inputs(self._runs[record["run"]], datasets=datasets, models=models)

    def _output(self, record: Record) -> None:
        from mlflow.entities import LoggedModelOutput

        run, client = self._runs[record["run"]], self._server.client()
        model = self._model(record["model"], run)
        outputs = client.get_run(run).outputs
        if model not in [output.model_id for output in (outputs.model_outputs if outputs else [])]:
            client.log_outputs(run, models=[LoggedModelOutput(model, 0)])

    def _model(self, record: Record, source_run: str | None) -> str:
        """The id of a model; it is created where this experiment does not have it."""
        fingerprint = record["fingerprint"]
        if fingerprint in self._models:
            return self._models[fingerprint]
        from mlflow.entities import LoggedModelStatus

        client, experiment = self._server.client(), self._server.experiment(self.journal.about["experiment"])
        found = client.search_logged_models(
            [experiment],
            filter_string=f"tags.`{FINGERPRINT_TAG}` = '{fingerprint}'",
            order_by=[{"field_name": "creation_time", "ascending": True}],
            max_results=1,
        )
        model = found[0] if found else _create_model(client, experiment, record, source_run)
        if model.status != LoggedModelStatus.READY:
            client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        self.journal.note_sent(self.journal.position, models={fingerprint: model.model_id})
        return str(model.model_id)

    def _tag(self, record: Record) -> None:
        self._server.client().set_tag(self._runs[record["run"]], record["key"], record["value"])

    def _upload(self, record: Record) -> None:
        run, file = self._runs[record["run"]], self.journal.folder / record["file"]
        if not file.exists():
            return
        try:
            self._server.client().log_artifact(run, str(file))
        except Exception as error:
            self._server.client().get_run(run)  # raises when it is the server that is away, not its file storage
            self._rejected(f"{file.name} could not be stored ({self._server.reason(error)})")

    def _end(self, record: Record) -> None:
        run, client = record["run"], self._server.client()
        client.set_terminated(self._runs[run], record["status"], record["at"])
        if run in self._perhaps_double:
            for double in self._search(run):
                if double != self._runs[run]:
                    self._do(partial(client.delete_run, double))
            self._perhaps_double.discard(run)


def _create_model(client: Any, experiment: str, record: Record, source_run: str | None) -> Any:
    """What `mlflow.create_external_model` does, for a given client: a model whose files MLflow does not hold."""
    return client.create_logged_model(
        experiment,
        name=record["name"],
        source_run_id=source_run,
        tags={
            FINGERPRINT_TAG: record["fingerprint"],
            "tessera.address": record["address"],
            "mlflow.model.isExternal": "true",
        },
        params=record["params"],
        model_type=record["type"],
    )


def _dataset(record: Record) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    address, digest = record["address"], record["digest"]
    scheme = address.split("://", 1)[0] if "://" in address else "local"
    profile = json.dumps(record["profile"])
    dataset = Dataset(record["name"], digest[:DIGEST_LENGTH], scheme, json.dumps({"uri": address}), profile=profile)
    tags = [InputTag("mlflow.data.context", record["context"]), InputTag(FINGERPRINT_TAG, digest)]
    return DatasetInput(dataset, tags)
