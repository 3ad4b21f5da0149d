"""LOST: the box of one object from the correlations of an image's patches.

Source: docs/methods.md#object-discovery.

Shape legend: h w grid of patches, N = h w, D width.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from torch import Tensor


def discover(map_hwD: Tensor, k: int = 100) -> tuple[int, int, int, int]:
    """The box (x0, y0, x1, y1) in patches, x1 and y1 exclusive.

    Objects cover less than their background: the patch that correlates with the fewest others is the seed. The patches
    of low degree that correlate with the seed join it, and every patch whose correlations with these sum to more than
    0 is part of the object, as far as it hangs together with the seed.

    Args:
        map_hwD: features, not normalised.
        k: patches of the lowest degree that may join the seed.
    """
    height, width = map_hwD.shape[:2]
    patches_ND = map_hwD.flatten(0, 1)
    correlation_NN = patches_ND @ patches_ND.T
    degree_N = (correlation_NN >= 0).sum(dim=1)
    lowest = degree_N.argsort(stable=True)[:k]
    seed = int(lowest[0])
    joined = lowest[correlation_NN[seed, lowest] >= 0]
    inside_hw = (correlation_NN[:, joined].sum(dim=1) > 0).reshape(height, width).numpy()
    inside_hw[np.unravel_index(seed, (height, width))] = True
    parts_hw, _ = ndimage.label(inside_hw)
    rows, columns = np.nonzero(parts_hw == parts_hw[np.unravel_index(seed, (height, width))])
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
