"""Reads the reference values. `TESSERA_GOLDEN` names another folder of files with the same names and keys."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "data"


def load(name: str) -> dict[str, Any]:
    """The arrays of one file by key; README.md beside the files says what they are."""
    folder = Path(os.environ.get("TESSERA_GOLDEN") or FOLDER)
    with np.load(folder / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def tensors(name: str) -> dict[str, Tensor]:
    """The same as torch tensors; scalars are 0-d, so take `.item()` where a plain number is wanted."""
    return {key: torch.as_tensor(value) for key, value in load(name).items() if value.dtype.kind in "fiub"}


def assert_close(actual: Tensor, expected: Tensor, atol: float) -> None:
    """Maximal absolute difference, in float64 (the tolerance column of the README)."""
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0.0, atol=atol)
