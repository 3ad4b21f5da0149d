"""Checks the rules for imports, sizes and names in pipeline/ and stages/ from the source text: nothing is imported.

Every import counts: at the top, inside a function, under TYPE_CHECKING, relative, `from package import module`, and
`import_module("...")`. The rules themselves are explained in test_import_graph.py.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TOPS = ("pipeline", "stages")
OPEN_ROOMS = {"data", "map_images", "models", "training"}
FACES = {
    "pipeline.config.registry",
    "pipeline.errors",
    "pipeline.stage",
    "pipeline.store.artifact",
    "pipeline.store.writer",
}
FACE_NAMES = {"pipeline.store.manifest.FileEntry"}  # the type of what Artifact.shards() returns
LONGEST = 400
EMPTY_NAMES = {"common", "helper", "helpers", "misc", "util", "utils"}
METHODS = ("stages", "pretrain", "methods")
WITHOUT_RAY = {"data", "finetune", "models", "pretrain", "training"}


@dataclass(frozen=True)
class Import:
    """One imported name.

    Args:
        file: Where, relative to the root.
        line: The line of the statement.
        name: What is imported, as an absolute dotted name.
        target: The file of the tree that `name` leads to; None where it is another package's.
    """

    file: Path
    line: int
    name: str
    target: Path | None

    def breaks(self, rule: str) -> str:
        """The message of a broken rule."""
        return f"{self.file}:{self.line} imports {self.name}: {rule}"


def violations(root: Path) -> list[str]:
    """Every broken rule in the project at `root`, one message each: file, line, import, rule."""
    imports = list(read_imports(root))
    checks = (_circles, _layers, _rooms, _faces, _losses, _methods, _ray)
    return [message for check in checks for message in check(imports)] + list(_files(root))


def read_imports(root: Path) -> Iterator[Import]:
    """The imports of every module in pipeline/ and stages/."""
    modules = {_dotted(path.relative_to(root)): path.relative_to(root) for path in _sources(root, TOPS)}
    for module, file in modules.items():
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(ast.parse((root / file).read_text(), str(file))):
            for name in _imported_names(node, package):
                yield Import(file, getattr(node, "lineno", 1), name, _target(name, modules))


def _sources(root: Path, tops: tuple[str, ...]) -> list[Path]:
    return sorted(path for top in tops for path in (root / top).rglob("*.py"))


def _dotted(file: Path) -> str:
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


def _imported_names(node: ast.AST, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        parents = package.split(".")
        above = parents[: len(parents) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        return [base if alias.name == "*" else f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in {"import_module", "__import__"}:
            return [str(node.args[0].value)]
    return []


def _target(name: str, modules: dict[str, Path]) -> Path | None:
    """The module that `name` is or lies in."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return modules.get(name)


# ----------------------------------------------------------------------------------------------------------- the rules
def _circles(imports: list[Import]) -> Iterator[str]:
    """One message for each import that leads back to its own file, along the shortest way; each circle once."""
    edges: dict[Path, dict[Path, Import]] = {}
    for found in imports:
        if found.target is not None and found.target != found.file:
            edges.setdefault(found.file, {}).setdefault(found.target, found)
    told: set[frozenset[Path]] = set()
    for start in sorted(edges):
        circle = _way_back(start, edges)
        files = frozenset(found.file for found in circle)
        if circle and files not in told:
            told.add(files)
            way = ", ".join(f"{found.file}:{found.line} imports {found.target}" for found in circle)
            yield f"{way}: imports go in no circle"


def _way_back(start: Path, edges: dict[Path, dict[Path, Import]]) -> list[Import]:
    """The fewest imports that lead from `start` to `start`; none where there is no such way."""
    came_by: dict[Path, Import] = {}
    layer = [start]
    while layer and start not in came_by:
        steps = [found for file in layer for found in edges.get(file, {}).values()]
        layer = []
        for found in steps:
            if found.target is not None and found.target not in came_by:
                came_by[found.target] = found
                layer.append(found.target)
    if start not in came_by:
        return []
    way = [came_by[start]]
    while way[0].file != start:
        way.insert(0, came_by[way[0].file])
    return way


def _layers(imports: list[Import]) -> Iterator[str]:
    for found in imports:
        if found.file.parts[0] == "pipeline" and found.name.split(".")[0] == "stages":
            yield found.breaks("pipeline imports nothing of stages")


def _room(file: Path) -> str:
    return file.parts[1].removesuffix(".py")


def _rooms(imports: list[Import]) -> Iterator[str]:
    for found in imports:
        if found.file.parts[0] == "stages" and found.target is not None and found.target.parts[0] == "stages":
            room, other = _room(found.file), _room(found.target)
            if room != other and other not in OPEN_ROOMS:
                yield found.breaks(f"a room of stages imports no other room than {', '.join(sorted(OPEN_ROOMS))}")


def _faces(imports: list[Import]) -> Iterator[str]:
    for found in imports:
        if found.file.parts[0] == "stages" and found.name.split(".")[0] == "pipeline":
            module = _dotted(found.target) if found.target is not None else found.name
            if module not in FACES and found.name not in FACE_NAMES:
                yield found.breaks(f"stages import of pipeline only {', '.join(sorted(FACES | FACE_NAMES))}")


def _losses(imports: list[Import]) -> Iterator[str]:
    for found in imports:
        if "losses" in found.file.parts[:-1]:
            of_losses = found.target is not None and "losses" in found.target.parts[:-1]
            if not of_losses and found.name.split(".")[0] not in {"torch", *sys.stdlib_module_names}:
                yield found.breaks("a loss imports only torch, the standard library and losses")


def _method_folder(file: Path) -> str | None:
    """`dino` for stages/pretrain/methods/dino/...; None for what lies in no method's folder."""
    inside = file.parts[:3] == METHODS and len(file.parts) > 4
    return file.parts[3] if inside and file.parts[3] != "shared" else None


def _methods(imports: list[Import]) -> Iterator[str]:
    for found in imports:
        other = _method_folder(found.target) if found.target is not None else None
        if found.file.parts[:2] == METHODS[:2] and other is not None:
            mine = _method_folder(found.file)
            if mine != other and not (mine or "").startswith(f"{other}_"):
                yield found.breaks(f"only a method that extends it ({other}_...) imports another method's folder")


def _ray(imports: list[Import]) -> Iterator[str]:
    for found in imports:
        without = found.file.parts[0] == "stages" and _room(found.file) in WITHOUT_RAY
        if without and found.file.parts[2] != "launch" and found.name.split(".")[0] == "ray":
            yield found.breaks("training and what it uses know no Ray; their launch folders do")


def _files(root: Path) -> Iterator[str]:
    for path in _sources(root, (*TOPS, "tests")):
        file = path.relative_to(root)
        lines = len(path.read_text().splitlines())
        if lines > LONGEST:
            yield f"{file} has {lines} lines: a file has at most {LONGEST}"
        empty = {word for part in file.with_suffix("").parts for word in part.split("_")} & EMPTY_NAMES
        if empty:
            yield f"{file} is called {', '.join(sorted(empty))}: a name says what is inside"
