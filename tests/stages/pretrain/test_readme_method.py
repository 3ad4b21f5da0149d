"""The README's method, as it stands there, trains."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config import registry
from tests.stages.pretrain.conftest import RunStage

README = Path(__file__).parents[3] / "README.md"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package with the file and the entry point of the README; gives the file's text."""
    section = README.read_text().partition("## Adding a method")[2].partition("\n## ")[0]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    entry = re.search(r"```toml\n(.*?)```", section, re.DOTALL)
    assert code
    assert entry
    package = tmp_path / "package"
    facts = package / "dense_simsiam-0.1.dist-info"
    facts.mkdir(parents=True)
    (package / "dense_simsiam.py").write_text(code[1])
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: dense-simsiam\nVersion: 0.1\n")
    (facts / "entry_points.txt").write_text("[tessera.methods]\n" + entry[1].split("]\n")[1].replace('"', ""))
    monkeypatch.syspath_prepend(package)
    monkeypatch.delitem(sys.modules, "dense_simsiam", raising=False)
    registry._entries.cache_clear()
    yield code[1]
    registry._entries.cache_clear()


def test_it_is_short_and_trains(installed: str, run_stage: RunStage) -> None:
    assert len([line for line in installed.splitlines() if line.strip()]) <= 40
    method = {"name": "dense_simsiam", "size": 32}
    optimizer = {"lr": 3e-3}
    _, artifact = run_stage(
        "a" * 24, {"method": method, "steps": 12, "optimizer": optimizer, "resources": {"workers": 0}}
    )
    rows = json.loads(artifact.read("curves.json"))
    assert rows[0]["agree"] > 0
    assert rows[-1]["agree"] < 0.9 * rows[0]["agree"]


def test_it_is_a_host_for_dsa(installed: str, run_stage: RunStage) -> None:
    method = {"name": "dsa", "host": {"name": "dense_simsiam", "size": 32}, "auxiliary": {"name": "resnet18"}}
    _, artifact = run_stage("b" * 24, {"method": method, "steps": 2, "resources": {"workers": 0}})
    row = json.loads(artifact.read("curves.json"))[-1]
    assert {"agree", "dsa_am", "dsa_con"} <= row.keys()
