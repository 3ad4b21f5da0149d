"""`make setup` on a machine that cannot have Tessera says so in one sentence, before it downloads anything."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("version", ["3.10.4", "3.14.0"])
def test_a_python_that_does_not_fit_is_named(version: str, tmp_path: Path) -> None:
    """With a Python of this machine that takes itself for another version."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    numbers = version.replace(".", ", ")
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$1" in\n'
        f"--version) echo Python {version} ;;\n"
        f'-c) exec python3 -c "import sys; sys.version_info = ({numbers}); $2" ;;\n'
        "esac\n"
    )
    python.chmod(0o755)
    done = subprocess.run(["make", "setup", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"needs Python 3.11 to 3.13, and {python} is Python {version}" in done.stderr
    assert "PYTHON=python3.12" in done.stderr
    assert not (tmp_path / ".venv").exists()
