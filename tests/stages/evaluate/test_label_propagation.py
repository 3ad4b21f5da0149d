"""Label propagation beside the plain version over all pairs of tokens, and its corner cases."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from stages.evaluate.label_propagation import propagate_labels, stretch_labels


def plain(target: Tensor, context: Tensor, labels: Tensor, radius: int, topk: int, temperature: float) -> Tensor:
    frames, _, height, width = context.shape
    a = functional.normalize(target, dim=0).flatten(1).T
    b = functional.normalize(context, dim=1).flatten(2).permute(0, 2, 1).flatten(0, 1)
    y, x = torch.arange(height * width) // width, torch.arange(height * width) % width
    near = ((y[:, None] - y).abs() <= radius) & ((x[:, None] - x).abs() <= radius)
    affinity = (a @ b.T / temperature).exp() * near.repeat(1, frames)
    out = []
    for row in affinity:
        fifth = row.sort(descending=True).values[topk - 1]
        row = torch.where(row >= fifth, row, 0)
        out.append(labels.transpose(0, 1).flatten(1) @ (row / row.sum()))
    return torch.stack(out, 1).view(-1, height, width)


@pytest.mark.parametrize(("radius", "topk"), [(1, 5), (2, 5), (3, 1), (20, 7)])
def test_equals_the_plain_version(radius: int, topk: int) -> None:
    generator = torch.Generator().manual_seed(radius)
    target = torch.randn(6, 5, 8, generator=generator, dtype=torch.float64)
    context = torch.randn(3, 6, 5, 8, generator=generator, dtype=torch.float64)
    labels = torch.rand(3, 4, 5, 8, generator=generator, dtype=torch.float64).softmax(1)
    expected = plain(target, context, labels, radius, topk, 0.1)
    got = propagate_labels(target, context, labels, radius=radius, topk=topk)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got.sum(0), torch.ones(5, 8, dtype=torch.float64))  # of soft labels that sum to 1


def test_top_tokens_are_of_all_frames_together() -> None:
    """One frame is alike, the other is not: with k = 1 its label gets nothing."""
    target = torch.ones(2, 3, 3)
    context = torch.stack([torch.ones(2, 3, 3), torch.tensor([1.0, -1.0])[:, None, None].expand(2, 3, 3)])
    labels = torch.stack([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])])[:, :, None, None].expand(2, 2, 3, 3)
    got = propagate_labels(target, context, labels, radius=0, topk=1)
    torch.testing.assert_close(got[0], torch.ones(3, 3))


def test_no_window_sees_everything() -> None:
    target, labels = torch.ones(1, 2, 9), torch.arange(18.0).reshape(1, 1, 2, 9)
    got = propagate_labels(target, target[None], labels, radius=-1, topk=18)
    torch.testing.assert_close(got, torch.full((1, 2, 9), 8.5))


def test_stretching_leaves_an_empty_map_and_a_flat_one() -> None:
    maps = torch.stack([torch.tensor([[0.2, 0.4]]), torch.zeros(1, 2), torch.full((1, 2), 0.3)])
    torch.testing.assert_close(stretch_labels(maps), torch.tensor([[[0.0, 1.0]], [[0.0, 0.0]], [[0.0, 0.0]]]))
