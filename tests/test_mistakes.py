"""Users' mistakes, each with the answer it must get: exit code, rule, place and remedy, and never a traceback.

The rows are in tests/mistakes/: a file `in_<where>.py` holds the list `IN_<WHERE>`.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from tests.mistakes.base import Mistake
from tests.mistakes.elsewhere import ELSEWHERE

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


def test_every_mistake_has_its_test() -> None:
    """The rows of the tables, and the ones that need more than one command, whose tests are elsewhere."""
    assert {int(re.match(r"\d+", mistake.row)[0]) for mistake in MISTAKES} | set(ELSEWHERE) == set(range(1, 48))
    for file, test in (name.split("::") for names in ELSEWHERE.values() for name in names):
        assert f"def {test}(" in (Path(__file__).parent / file).read_text(), f"{file} has no {test}"
