"""The registry imports classes by their path, and says which path it could not import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import registry
from pipeline.errors import UsageError


def test_a_path_gives_the_class() -> None:
    assert registry.imported("pathlib:Path") is Path


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("pathlib.Path", "module:Class"),
        ("pathlib:", "pathlib:"),
        (":Path", ":Path"),
        ("pathlib:Path:home", "invalid format"),
        ("no_such_package.module:Class", "no_such_package"),
        ("pathlib:NoSuchClass", "NoSuchClass"),
    ],
)
def test_what_cannot_be_imported_is_named(path: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        registry.imported(path)
    assert repr(path) in str(caught.value)
    assert reason in str(caught.value)


def test_a_module_whose_own_import_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"'needs_more:Thing'.*a_package_that_is_not_installed"):
        registry.imported("needs_more:Thing")


def test_the_registry_is_light_and_apart_from_the_rest_of_config() -> None:
    """Modules with stages' settings import it, and every plan imports those."""
    code = (
        "import sys, pipeline.config.registry\n"
        "heavy = {'torch', 'ray', 'mlflow', 'numpy', 'pyarrow', 'obstore', 'rich', 'yaml'} & set(sys.modules)\n"
        "config = [m for m in sys.modules if m.startswith('pipeline.config.')]\n"
        "print(sorted(heavy), config)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[] ['pipeline.config.registry']"
