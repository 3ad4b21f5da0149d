"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def local_path(text: str) -> Path:
    """A path as a user writes it, with `~` and variables of the environment (`$HOME`) replaced."""
    return Path(os.path.expandvars(text)).expanduser()
