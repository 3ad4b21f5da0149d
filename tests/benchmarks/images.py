"""The images that a benchmark reads from data/; where they are missing, it stops and says how to get them."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def find_images(name: str, pattern: str, root: Path = ROOT) -> list[Path]:
    """Images of `data/<name>` in order of their paths.

    Args:
        name: `objects`, `scenes`, `boxes` or `video`.
        pattern: Glob inside that folder.
        root: The project's folder.

    Raises:
        SystemExit: There are none.
    """
    files = sorted((root / "data" / name).glob(pattern))
    if not files:
        raise SystemExit(
            f"data/{name} has no images ({pattern}), this benchmark needs them: make them with `python "
            f"configs/prepare_data.py {name} --source ARCHIVE` (--help says what to download)"
        )
    return files
