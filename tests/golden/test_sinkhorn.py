"""Sinkhorn against SwAV's, DINOv2's and Leopart's own functions (sinkhorn.npz, leopart_sinkhorn.npz)."""

import pytest
import torch

from stages.pretrain.losses.sinkhorn import sinkhorn
from tests.golden.golden import assert_close, tensors


@pytest.mark.parametrize("iterations", [3, 10])
def test_equals_swav_and_dinov2(iterations: int) -> None:
    golden = tensors("sinkhorn")
    q = sinkhorn(golden["scores"], epsilon=golden["epsilon"].item(), iterations=iterations)
    assert_close(q, golden[f"swav_iter{iterations}"], 1e-10)
    assert_close(q, golden[f"dinov2_iter{iterations}_fp32"], 1e-5)


def test_equals_leopart() -> None:
    golden = tensors("leopart_sinkhorn")
    assert_close(sinkhorn(golden["scores"], epsilon=golden["eps"].item()), golden["q"], 1e-6)


def test_float32_is_near_float64_and_does_not_overflow() -> None:
    golden = tensors("sinkhorn")
    q = sinkhorn(golden["scores"].float() + 1000, epsilon=golden["epsilon"].item())
    assert torch.isfinite(q).all()
    torch.testing.assert_close(q.double(), golden["swav_iter3"], rtol=0, atol=2e-3)  # 1000 costs float32 three digits
