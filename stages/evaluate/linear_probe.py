"""A linear classifier (1x1 convolution) on cached, frozen feature maps, and its predictions at a mask's size.

Shape legend: n images, B of them in a step, D width, h w grid of the features, K classes, S side of the labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class LinearProbe:
    """K linear classifiers."""

    weight: Tensor  # (K, D)
    bias: Tensor  # (K,)

    def logits(self, map_BDhw: Tensor) -> Tensor:
        """The classes' scores at every cell of a feature map, (B, K, h, w)."""
        return functional.conv2d(map_BDhw, self.weight[:, :, None, None], self.bias)

    @torch.inference_mode()
    def predict(self, map_Dhw: Tensor, height: int, width: int) -> NDArray[np.int64]:
        """Class of every pixel, (height, width): logits enlarged bilinearly, then the largest."""
        logits = functional.interpolate(self.logits(map_Dhw[None]), (height, width), mode="bilinear")
        return np.asarray(logits[0].argmax(dim=0).cpu().numpy(), np.int64)


def fit(
    maps_nDhw: NDArray[np.float16],
    labels_nSS: NDArray[np.int16],
    rows: NDArray[np.int64],
    classes: int,
    *,
    lr: float,
    samples: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    report: Callable[[int], None] = lambda samples: None,
) -> LinearProbe:
    """Adam on the cross-entropy of bilinearly enlarged logits.

    The same seed gives the same classifier on the same kind of device.

    Args:
        maps_nDhw: cached feature maps.
        labels_nSS: class indices; those below 0 do not count.
        rows: the cached images to learn from.
        classes: K.
        lr: learning rate.
        samples: images to learn from in all, drawn from `rows` in shuffled epochs.
        batch_size: B.
        seed: of the initial weights and of the order of the images.
        device: where the training runs.
        report: called after each step with the number of samples so far.
    """
    weight_KD = torch.empty(classes, maps_nDhw.shape[1])
    torch.nn.init.normal_(weight_KD, std=0.01, generator=torch.Generator().manual_seed(seed))
    probe = LinearProbe(
        weight_KD.to(device).requires_grad_(True), torch.zeros(classes, device=device, requires_grad=True)
    )
    optimizer = torch.optim.Adam([probe.weight, probe.bias], lr=lr)
    enlarge_h, enlarge_w = (_enlarging(side, labels_nSS.shape[1]).to(device) for side in maps_nDhw.shape[2:])
    done = 0
    for chosen in _draws(rows, samples, batch_size, seed):
        maps_BDhw = torch.from_numpy(maps_nDhw[chosen]).to(device).float()
        labels_BSS = torch.from_numpy(labels_nSS[chosen]).to(device).long()
        logits = enlarge_h @ probe.logits(maps_BDhw) @ enlarge_w.T
        total = functional.cross_entropy(logits, labels_BSS, ignore_index=-1, reduction="sum")
        loss = total / (labels_BSS >= 0).sum().clamp(min=1)  # a batch of void alone must not divide by zero
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        done += len(chosen)
        report(done)
    return LinearProbe(probe.weight.detach(), probe.bias.detach())


def _enlarging(small: int, large: int) -> Tensor:
    """Linear interpolation of one side as a matrix, (large, small).

    Two products enlarge a map exactly as `interpolate(mode="bilinear")` does, at half its cost on a CPU, forward and
    backward.
    """
    return functional.interpolate(torch.eye(small)[None], large, mode="linear")[0].T.contiguous()


def _draws(rows: NDArray[np.int64], samples: int, batch_size: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Batches of rows from shuffled epochs, until `samples` are drawn; an epoch's last batch may be smaller."""
    generator = np.random.default_rng(seed)
    left = samples
    while left > 0:
        epoch = generator.permutation(rows)
        for start in range(0, len(epoch), batch_size):
            batch = epoch[start : start + min(batch_size, left)]
            if len(batch):
                yield np.sort(batch)  # the cache is read in its own order
            left -= len(batch)


def held_out(count: int, seed: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Indices of the rest and of a random fifth, on which the learning rate is chosen (never on the test images)."""
    order = np.random.default_rng(seed).permutation(count)
    size = max(1, count // 5)
    return np.sort(order[size:]), np.sort(order[:size])
