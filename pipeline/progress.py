"""How long work says how far it is: one type of callback, for stages, the store and the terminal's progress bar."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

ProgressCallback: TypeAlias = Callable[[float, float, str], None]
"""Called with (done, total, unit), for example (120, 5000, "images"); a total of 0 means that it is not known."""
