"""What is sent with a job: the code of every package that offers stages, its metadata, and no data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.run.jobs.package import Package, make_package


def test_the_code_and_its_entry_points_are_sent_and_no_data() -> None:
    package = make_package({"p.yaml": "stages: {}\n"})
    names = set(package.files)
    assert {"pipeline/cli/main.py", "stages/ingest/stage.py", "p.yaml"} <= names
    assert not [name for name in names if name.endswith((".pyc", ".png", ".jpg", ".parquet")) or "/." in name]
    assert [name for name in names if name.endswith(".dist-info/entry_points.txt")] == [
        "tessera-0.1.0.dist-info/entry_points.txt"
    ]
    assert package.bytes < 10 << 20


def test_the_package_alone_finds_its_stage_types(tmp_path: Path) -> None:
    """As on a node that has other packages installed, but not Tessera: `-S` hides what is installed here."""
    make_package({}).write(tmp_path)
    code = (
        "from importlib.metadata import entry_points; import importlib.util as u; "
        "print(sorted(e.name for e in entry_points(group='tessera.stages')), u.find_spec('pipeline').origin)"
    )
    found = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "'ingest'" in found.stdout
    assert str(tmp_path) in found.stdout


def test_excluded_paths_are_not_sent() -> None:
    package = make_package({}, ["stages/evaluate", "pipeline/cli/*.py"])
    assert not [name for name in package.files if name.startswith(("stages/evaluate/", "pipeline/cli/"))]
    assert "stages/ingest/stage.py" in package.files


def test_a_package_over_the_limit_names_its_largest_files(tmp_path: Path) -> None:
    (tmp_path / "big.bin").write_bytes(bytes(3000))
    package = Package({"small.py": "x = 1\n", "weights/big.bin": tmp_path / "big.bin"})
    package.check_size(4000)
    with pytest.raises(UsageError, match=r"weights/big\.bin .*--exclude"):
        package.check_size(2000)
