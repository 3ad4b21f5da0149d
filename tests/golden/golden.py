"""Reads the golden files: numbers made by the papers' official code or by brute force from an equation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FOLDER = Path(os.environ.get("TESSERA_GOLDEN") or Path(__file__).parent / "data")


def load(name: str) -> dict[str, NDArray[Any]]:
    """All arrays of `<name>.npz` in the folder that TESSERA_GOLDEN names, else in tests/golden/data."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}
