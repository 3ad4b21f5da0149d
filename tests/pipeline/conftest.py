"""The workshop, for tests of the runner and the command line; fixtures of the tests of configs and plans."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline.pipelines import load, registered, scenes, write  # noqa: F401 - fixtures
from tests.pipeline.workshop import Workshop


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)
