"""The fixed sin-cos position table against FLSL's own."""

from __future__ import annotations

import numpy as np
import torch

from stages.models.positions import sincos_table
from tests.golden.golden import load


def test_sincos_table_without_and_with_class_token() -> None:
    golden = load("sincos_pos_embed")
    width, grid = int(golden["dim"]), int(golden["grid"])
    bare = sincos_table(width, (grid, grid))
    assert bare.dtype == torch.float64
    np.testing.assert_allclose(bare.numpy(), golden["no_cls"], atol=1e-6)
    np.testing.assert_allclose(sincos_table(width, (grid, grid), prefix=1).numpy(), golden["with_cls"], atol=1e-6)
