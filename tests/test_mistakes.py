"""Users' mistakes, each with the answer it must get: exit code, rule, place and remedy, and never a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mistakes.base import Mistake
from tests.mistakes.in_configs import IN_CONFIGS
from tests.mistakes.in_exports import IN_EXPORTS

MISTAKES = [*IN_CONFIGS, *IN_EXPORTS]


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_a_mistake_is_answered(mistake: Mistake, tmp_path: Path) -> None:
    mistake.make(tmp_path)
    code, shown = mistake.commit(tmp_path)
    assert code == mistake.code, shown
    assert "Traceback" not in shown, shown
    missing = [word for word in mistake.words if word.lower() not in " ".join(shown.lower().split())]
    assert not missing, f"{missing} not in:\n{shown}"
