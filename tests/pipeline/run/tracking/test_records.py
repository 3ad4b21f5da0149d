"""What is told to MLflow: whose results a stage's metrics are, and values that MLflow would change."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.run.mirrors import Mirrors
from pipeline.run.tracking import address, records
from pipeline.run.tracking.journal import Journal, leftovers
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from tests.pipeline.run.tracking.servers import everything_below
from tests.pipeline.workshop import PIPELINE, Workshop


def test_results_belong_to_the_one_model_and_the_first_dataset(workshop: Workshop) -> None:
    workshop.write(PIPELINE + "  wide: {{uses: fake_encoder, numbers: scaled, width: 5}}\n")
    workshop.tessera("run", "p.yaml")
    store = ArtifactStore(str(workshop.folder / "store"))
    rows = {row["stage"]: row for row in workshop.json("artifacts", "ls", "p.yaml")}
    found = {name: store.find(row["kind"], row["fingerprint"]) for name, row in rows.items()}
    numbers, encoder, wide, score = (found[name] for name in ("numbers", "encoder", "wide", "score"))
    assert numbers is not None and encoder is not None and wide is not None and score is not None  # noqa: PT018
    on = {"dataset": ["numbers", numbers.fingerprint[:36]]}

    def about(made: Artifact, **inputs: Artifact) -> dict[str, Any]:
        return records.measured(made, inputs, records.models_read(inputs))

    assert about(score, of=encoder, on=numbers) == {"model": encoder.fingerprint, **on}
    assert about(score, of=encoder) == {"model": encoder.fingerprint}
    assert about(score, of=encoder, than=wide, on=numbers) == {}
    assert about(wide, init=encoder, images=numbers) == {"model": wide.fingerprint, **on}
    # The score was made with the encoder, so what reads the score is about the encoder; the encoder may be deleted.
    made_with = {"numbers": numbers, "features": score}
    assert about(score, **made_with) == {"model": encoder.fingerprint, **on}
    store.discard(encoder.kind, encoder.fingerprint)
    assert about(score, **made_with) == {}


def test_what_mlflow_would_store_as_zero_is_not_tied_to_a_model() -> None:
    assert records.may_be_tied(0.0)
    assert not records.may_be_tied(float("nan"))


def test_secrets_are_taken_out_of_what_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "token-in-the-environment")
    uri = "http://me:p%40ssword@host:5000"
    text = f"{uri}/api said\nno to p@ssword and token-in-the-environment"
    assert address.scrubbed(text, uri) == "http://me:***@host:5000/api said no to *** and ***"
    assert address.authorization(uri) == "Basic bWU6cEBzc3dvcmQ="
    assert address.authorization("http://host:5000") == "Bearer token-in-the-environment"


def test_threads_write_whole_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_STATE", str(tmp_path))
    journal = Journal.create("http://host:5000", "p")

    def write(run: str) -> None:
        for step in range(500):
            journal.append(records.metrics(run, {"loss": step / 3, "x" * 300: 1.0}, step))

    threads = [threading.Thread(target=write, args=(f"run {i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert journal.waiting == 2000
    steps: dict[str, list[int]] = {f"run {i}": [] for i in range(4)}
    reads = 0
    while True:
        found, position = journal.read()
        if not found:
            break
        reads += 1
        for record in found:
            steps[record["run"]].append(record["step"])
        journal.note_sent(position)
    assert reads > 1  # what waits is not read into memory at once
    assert all(seen == list(range(500)) for seen in steps.values())
    journal.close(delete=True)
    assert not journal.folder.exists()


def test_a_mirror_that_fails_in_two_stages_at_once_is_told_once() -> None:
    warnings: list[str] = []
    mirrors = Mirrors({"tensorboard": "boards"}, "p", warnings.append)
    meet = threading.Barrier(2)

    def fail() -> None:
        with mirrors.guarded("tensorboard"):
            meet.wait()
            raise ConnectionError("gone")

    threads = [threading.Thread(target=fail) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(warnings) == 1


def test_records_hold_no_secret_and_survive_a_line_cut_by_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESSERA_STATE", str(tmp_path))
    from pipeline.run.tracking.journal import Journal

    journal = Journal.create("http://me:hush-hush@host:5000", "p")
    journal.append({"op": "tag", "run": "a"})
    with journal.records.open("ab") as file:
        file.write(b'{"op": "tag", "ru')
    assert "hush" not in everything_below(journal.folder)
    found, position = journal.read()
    assert found == [{"op": "tag", "run": "a"}]
    journal.note_sent(position, runs={"a": "b"})
    journal.close(delete=False)
    (again,) = leftovers("http://host:5000")
    assert (again.position, again.ids["runs"]) == (position, {"a": "b"})
    assert json.loads((again.folder / "about.json").read_text())["address"] == "http://host:5000"
    again.close(delete=True)
    assert not list(leftovers())
