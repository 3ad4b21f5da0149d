"""Stores that cannot be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.mistakes.base import Mistake


def _read_only(folder: Path) -> None:
    (folder / "store").mkdir()
    (folder / "store").chmod(0o555)
    if os.access(folder / "store", os.W_OK):
        pytest.skip("this user may write everywhere")


IN_STORES = [
    Mistake(
        "24a",
        "a store that cannot be made",
        ["p.yaml:1: store: /proc/nostore", "cannot be made", "name a folder"],
        replace=[("store: store", "store: /proc/nostore")],
    ),
    Mistake(
        "24b",
        "a store that is a file",
        ["p.yaml:1: store:", "is a file, not a folder", "name a folder"],
        replace=[("store: store", "store: p.yaml")],
    ),
    Mistake(
        "24c",
        "a store without permission",
        ["p.yaml:1: store:", "may not write there", "change its owner"],
        prepare=_read_only,
    ),
    Mistake(
        "24d",
        "a store of the command line",
        ["store /proc/nostore: cannot write it: its folder cannot be made"],
        options=["--store", "/proc/nostore"],
    ),
]
