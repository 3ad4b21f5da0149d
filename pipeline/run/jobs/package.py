"""What `tessera submit` sends: the code of the packages that offer stages or methods, and one pipeline file.

The packages are those with an entry point in one of Tessera's groups, Tessera itself among them, so that a cluster runs
the code of the machine that submits, whatever version its own image has. The metadata of a package goes with its code,
because entry points are found there. No data is sent: the cluster reaches sources and store by their addresses.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import Distribution, distributions
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.run.display import size

GROUPS = "tessera."  # what the names of Tessera's entry-point groups begin with
LARGEST = 100 << 20  # bytes of code; Ray's job servers have taken that much in all their versions
NEVER_SENT = ("__pycache__", "*.pyc", ".*")
COMPILED = (".so", ".pyd", ".dylib")


@dataclass(frozen=True)
class Package:
    """The files of a submission, and the packages that could not be part of it."""

    files: Mapping[str, Path | str] = field(repr=False)  # path in the package -> local file, or the text itself
    left_out: Sequence[str] = ()  # packages with compiled parts, which must be installed on the cluster

    @property
    def bytes(self) -> int:
        """Size of all files, not compressed."""
        return sum(map(_bytes_of, self.files.values()))

    def check_size(self, largest: int = LARGEST) -> None:
        """Refuse a package that a job server may refuse.

        Raises:
            UsageError: with the largest files.
        """
        if self.bytes <= largest:
            return
        top = sorted(self.files, key=lambda name: _bytes_of(self.files[name]), reverse=True)[:3]
        named = ", ".join(f"{name} ({size(_bytes_of(self.files[name]))})" for name in top)
        raise UsageError(
            f"the package has {size(self.bytes)}, and a job takes {size(largest)} of code at most; its largest files "
            f"are {named} (leave data out with --exclude PATTERN)"
        )

    def write(self, folder: Path) -> None:
        """Put the files into a folder."""
        for name, content in self.files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                target.write_text(content, encoding="utf-8")
            else:
                shutil.copyfile(content, target)


def make_package(texts: Mapping[str, str], exclude: Sequence[str] = ()) -> Package:
    """Collect the code that a run needs.

    Args:
        texts: further files, path in the package -> content.
        exclude: patterns of paths in the package that are not sent, as `stages/fonts` or `*.bin`.
    """
    files: dict[str, Path | str] = {}
    left_out = []
    for distribution in _offering():
        code = dict(_code_of(distribution))
        if any(path.endswith(COMPILED) for path in code):
            left_out.append(distribution.name)
            continue
        files |= code
        info = f"{distribution.name.replace('-', '_')}-{distribution.version}.dist-info"
        files[f"{info}/entry_points.txt"] = distribution.read_text("entry_points.txt") or ""
        files[f"{info}/METADATA"] = (
            f"Metadata-Version: 2.1\nName: {distribution.name}\nVersion: {distribution.version}\n"
        )
    kept = {path: content for path, content in files.items() if not _matches(path, exclude)}
    return Package({**kept, **texts}, left_out)


def _offering() -> Iterator[Distribution]:
    """Installed distributions with an entry point of ours; the first of each name is the one that Python imports."""
    seen = set()
    for distribution in distributions():
        if distribution.name not in seen and any(e.group.startswith(GROUPS) for e in distribution.entry_points):
            seen.add(distribution.name)
            yield distribution


def _code_of(distribution: Distribution) -> Iterator[tuple[str, Path]]:
    """The files of the top-level packages and modules that a distribution's entry points lie in."""
    tops = dict.fromkeys(entry.module.split(".")[0] for entry in distribution.entry_points)
    for top in tops:
        spec = importlib.util.find_spec(top)
        if spec is None:
            continue  # its import fails here too, and a pipeline that uses it says so
        for folder in spec.submodule_search_locations or ():
            for file in sorted(Path(folder).rglob("*")):
                inside = file.relative_to(Path(folder))
                if file.is_file() and not any(_matches(part, NEVER_SENT) for part in inside.parts):
                    yield f"{top}/{inside.as_posix()}", file
        if not spec.submodule_search_locations and spec.origin:
            yield Path(spec.origin).name, Path(spec.origin)


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) or path.startswith(f"{pattern.rstrip('/')}/") for pattern in patterns)


def _bytes_of(content: Path | str) -> int:
    return len(content.encode()) if isinstance(content, str) else content.stat().st_size
