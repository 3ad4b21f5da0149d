"""Our separable RoIAlign against torchvision's reference values, and its gradient against torchvision's operator."""

import pytest
import torch
from torchvision.ops import roi_align as torchvision_roi_align

from stages.pretrain.losses.roi_align import roi_align
from tests.golden.golden import assert_close, tensors


@pytest.mark.parametrize(
    ("key", "options"),
    [("out7", {}), ("out7_unaligned", {"aligned": False}), ("out7_sr2", {"sampling_ratio": 2})],
)
def test_equals_torchvision(key: str, options: dict) -> None:
    golden = tensors("roi_align")
    images, regions = golden["boxes"].shape[:2]
    maps = golden["x"].repeat_interleave(regions, dim=0)
    out = roi_align(maps, golden["boxes"].flatten(0, 1), size=golden[key].shape[-1], **options)
    assert len(out) == images * regions
    assert_close(out, golden[key], 1e-10)


def test_gradient_equals_the_operator() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(5, 4, 9, 14, generator=generator).requires_grad_()
    corners = torch.rand(5, 2, 2, generator=generator).sort(dim=1).values * torch.tensor([14.0, 9.0])
    boxes = corners.flatten(1)
    weights = torch.randn(5, 4, 7, 7, generator=generator)

    ours = torch.autograd.grad((roi_align(maps, boxes) * weights).sum(), maps)[0]
    theirs = torch.autograd.grad(
        (torchvision_roi_align(maps, list(boxes[:, None]), 7, aligned=True) * weights).sum(), maps
    )[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
