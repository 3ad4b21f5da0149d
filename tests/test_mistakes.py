"""Users' mistakes, each with the answer it must get: exit code, rule, place and remedy, and never a traceback.

The rows are in tests/mistakes/: a file `in_<where>.py` holds the list `IN_<WHERE>`.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from tests.mistakes.base import Mistake

TABLES = sorted(path.stem for path in (Path(__file__).parent / "mistakes").glob("in_*.py"))
MISTAKES: list[Mistake] = [
    mistake for name in TABLES for mistake in getattr(import_module(f"tests.mistakes.{name}"), name.upper())
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_a_mistake_is_answered(mistake: Mistake, tmp_path: Path) -> None:
    mistake.make(tmp_path)
    code, shown = mistake.commit(tmp_path)
    assert code == mistake.code, shown
    assert "Traceback" not in shown, shown
    missing = [word for word in mistake.words if word.lower() not in " ".join(shown.lower().split())]
    assert not missing, f"{missing} not in:\n{shown}"
