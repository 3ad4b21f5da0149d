"""RoIAlign of several boxes of a map equals one box at a time."""

from __future__ import annotations

import torch

from stages.pretrain.losses.roi_align import roi_align, roi_align_regions


def test_several_boxes_of_a_map_equal_one_at_a_time() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(3, 4, 9, 14, generator=generator, dtype=torch.float64).requires_grad_()
    corners = torch.rand(3, 5, 2, 2, generator=generator, dtype=torch.float64).sort(dim=2).values
    boxes = (corners * torch.tensor([14.0, 9.0])).flatten(2)
    weights = torch.randn(15, 4, 6, 6, generator=generator, dtype=torch.float64)
    one = roi_align(maps.repeat_interleave(5, dim=0), boxes.flatten(0, 1), size=6)
    several = roi_align_regions(maps, boxes, size=6)
    torch.testing.assert_close(several, one)
    expected, actual = (torch.autograd.grad((out * weights).sum(), maps)[0] for out in (one, several))
    torch.testing.assert_close(actual, expected)
