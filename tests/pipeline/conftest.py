"""Fixtures: the workshop for tests of the runner and the command line, those of pipelines.py for configs and plans."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config import registry
from tests.pipeline.bucket import s3_address, s3_environment, s3_server  # noqa: F401 - fixtures
from tests.pipeline.pipelines import load, registered, scenes, write  # noqa: F401 - fixtures
from tests.pipeline.workshop import FAKES, Workshop


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
    """A workshop whose folder is the working folder, with the fake package installed."""
    workshop = Workshop(tmp_path)
    for name, value in workshop.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(FAKES)
    handler = signal.getsignal(signal.SIGTERM)
    registry._entries.cache_clear()
    yield workshop
    workshop.close()
    registry._entries.cache_clear()
    signal.signal(signal.SIGTERM, handler)
