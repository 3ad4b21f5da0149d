"""Which code made an artifact: versions of the packages and the commit, for its manifest."""

from __future__ import annotations

import contextlib
import functools
import platform
import re
import subprocess
from pathlib import Path
from typing import Any


def package_versions(extra: tuple[str, ...] = ()) -> dict[str, str]:
    """Versions of Python, of Tessera's direct dependencies and of the packages in `extra`."""
    from importlib import metadata

    versions = {"python": platform.python_version()}
    own = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in metadata.requires("tessera") or ()]
    for name in ("tessera", *own, *extra):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return dict(sorted(versions.items()))


@functools.lru_cache(maxsize=1)
def git_commit() -> dict[str, Any] | None:
    """Commit of the code that runs, and whether the working tree differs from it; None outside a repository."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None
