"""What deploy/ holds is well formed, calls commands that exist, and holds no secret."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file() and path.name != ".env")
SETTINGS = [path for path in FILES if path.suffix in (".yaml", ".yml")]


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_secret_is_in_clear(path: Path) -> None:
    assert not re.search(r"(?i)(token|secret|password)\w*\s*[:=]\s*['\"]?[A-Za-z0-9+/]{16,}", path.read_text())


def test_the_files_are_the_ones_that_the_readme_describes() -> None:
    named = set(re.findall(r"deploy/([\w./-]+\.(?:yaml|env))", (DEPLOY / "README.md").read_text()))
    assert {path.relative_to(DEPLOY).as_posix() for path in SETTINGS} <= named
    assert all((DEPLOY / name).exists() for name in named)


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.name)
def test_settings_are_one_mapping_each(path: Path) -> None:
    assert documents(path)


def test_every_variable_of_the_compose_file_is_in_the_example() -> None:
    needed = set(re.findall(r"\$\{(\w+)", (DEPLOY / "compose.yaml").read_text()))
    given = dict(
        line.split("=")
        for line in (DEPLOY / "example.env").read_text().split("\n")
        if "=" in line[:60] and line[0] != "#"
    )
    assert needed == set(given)
    assert not any(given.values()), "an example must not work as it is"


def test_every_port_of_the_compose_file_is_on_loopback() -> None:
    (compose,) = documents(DEPLOY / "compose.yaml")
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_manifests_have_tokens_and_the_ray_that_is_locked() -> None:
    ray = re.search(r"^ray==([\d.]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)[1]
    for path in (DEPLOY / "kuberay").glob("*.yaml"):
        (manifest,) = documents(path)
        cluster = manifest["spec"].get("rayClusterSpec", manifest["spec"])
        assert cluster["authOptions"]["mode"] == "token"
        assert cluster["rayVersion"] == ray


def test_images_copy_what_they_install() -> None:
    kept = (DEPLOY / "Dockerfile.dockerignore").read_text()
    copied = re.findall(r"^COPY (.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    for name in " ".join(copied).split():
        assert (ROOT / name).exists()
        assert f"!{name}" in kept


def test_what_the_security_page_calls_tested_has_its_tests() -> None:
    named = set(re.findall(r"tests/[\w/.]+", (ROOT / "SECURITY.md").read_text()))
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]
