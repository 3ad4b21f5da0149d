"""Runs the real stage against a real store, and hands back what it wrote."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.stage import Context, Outcome, Resources
from pipeline.store.artifact import Artifact
from pipeline.store.store import ArtifactStore
from stages.data.rows import read_shard
from stages.data.tables import SCHEMAS
from stages.ingest.settings import IngestConfig
from stages.ingest.stage import Ingest

FINGERPRINT = "0123456789abcdef01234567"


@dataclass
class Ingested:
    outcome: Outcome
    artifact: Artifact
    said: list[str]

    @property
    def rows(self) -> list[dict[str, Any]]:
        tables = [read_shard(self.artifact, entry) for entry in self.artifact.shards()]
        assert all(table.schema.equals(SCHEMAS["images"]) for table in tables)
        return [row for table in tables for row in table.to_pylist()]

    @property
    def by_key(self) -> dict[str, dict[str, Any]]:
        return {row["key"]: row for row in self.rows}

    @property
    def reasons(self) -> dict[str, str]:
        return {problem["key"]: problem["reason"] for problem in self.outcome.problems}


@pytest.fixture
def ingest(tmp_path: Path) -> Callable[..., Ingested]:
    """`ingest(source=..., layout=...)` in a store of its own."""
    made = iter(range(100))

    def run(**config: Any) -> Ingested:
        store = ArtifactStore(str(tmp_path / f".store{next(made)}"))
        writer, said = store.begin("images", FINGERPRINT), []
        context = Context("images", FINGERPRINT, {}, writer, Resources(), say=said.append)
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in config.items()}
        outcome = Ingest(IngestConfig(**settings)).run(context)
        fields = {"counts": outcome.counts, "problems": outcome.problems, "notes": outcome.notes}
        return Ingested(outcome, writer.commit(fields, preview=outcome.preview), said)

    return run
