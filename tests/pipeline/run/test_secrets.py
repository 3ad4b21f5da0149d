"""Credentials of an object store go to its server, and nowhere else: not to the screen, the store or MLflow."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.store.objects import Objects
from tests.pipeline.store.faulty_proxy import faulty_proxy, first
from tests.pipeline.workshop import Workshop

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAXYZZYXYZZYXYZZY0",
    "AWS_SECRET_ACCESS_KEY": "hunter2hunter2hunter2hunter2hunter2hunte",
    "AWS_SESSION_TOKEN": "tokentokentokentokentokentokentoken",
}


def test_a_run_writes_no_credential_anywhere(
    workshop: Workshop, s3_address: str, s3_environment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    workshop.write(tracking=f"sqlite:///{workshop.folder}/mlflow.db")
    with faulty_proxy(s3_environment) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        proxy.plan = first(5, "slow down", "PUT")
        shown = workshop.tessera("run", "p.yaml", "--store", s3_address)
        monkeypatch.setenv("TESSERA_STORE_PATIENCE", "0.3")
        proxy.plan = first(1000, "internal error", "PUT")
        failed = workshop.outside("run", "p.yaml", "--store", s3_address, "--force", "encoder", code=2)
        assert "the server fails" in failed.stderr
    printed = "".join(one.stdout + one.stderr for one in (shown, failed))
    objects = Objects(s3_address)
    stored = {f"{s3_address}/{found.path}": objects.get(found.path) or b"" for found in objects.walk()}
    written = {str(path): path.read_bytes() for path in Path(workshop.folder).rglob("*") if path.is_file()}
    assert len(stored) > 10
    assert f"{workshop.folder}/mlflow.db" in written
    for name, value in SECRETS.items():
        assert value not in printed, name
        assert [place for place, data in {**stored, **written}.items() if value.encode() in data] == [], name
