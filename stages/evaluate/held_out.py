"""Which train images an evaluation chooses its hyper-parameters on."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def held_out(count: int, seed: int, *, parts: int = 5) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Indices of the rest and of a random fifth (or `parts`-th), on which something is chosen, never on test images."""
    order = np.random.default_rng(seed).permutation(count)
    size = max(1, count // parts)
    return np.sort(order[size:]), np.sort(order[:size])
