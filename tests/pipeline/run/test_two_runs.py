"""Two users run the same pipeline file at the same moment, on one store: each stage is computed once."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest

from pipeline.store.store import ArtifactStore
from tests.pipeline.workshop import Workshop


@pytest.fixture(params=["local", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "shared") if request.param == "local" else str(request.getfixturevalue("s3_address"))


def test_two_runs_that_start_together_share_the_work(workshop: Workshop, address: str) -> None:
    command = ("run", "p.yaml", "--store", address, "--json")
    states: dict[str, list[str]] = {}
    for process in [workshop.start(*command), workshop.start(*command)]:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        for stage in json.loads(output)["stages"]:
            states.setdefault(stage["name"], []).append(stage["state"])
    assert sorted(states) == ["encoder", "numbers", "scaled", "score"]
    assert all(sorted(both) == ["cached", "done"] for both in states.values())
    assert sorted(workshop.ran) == ["encoder", "numbers", "scaled", "score"]
    assert workshop.json("artifacts", "verify", "--store", address)["damaged"] == []
    store = ArtifactStore(address)
    assert len(list(store.artifacts())) == 4
    assert store.gc(older_than=timedelta(0)) == []
