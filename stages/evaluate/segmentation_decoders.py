"""The decoders that `segment_linear` trains on cached, frozen feature maps, and how they are trained.

Source: docs/methods.md#linear-segmentation.

Shape legend: n images, B of them in a step, D width, h w grid of the features, K classes, S side of the labels, h' w'
grid of the logits, which the FCN makes eight times larger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from torch import Tensor, nn

from stages.evaluate.segment_linear_settings import ProbeTraining, SegmentLinearConfig


class SegmentationDecoder(nn.Module):
    """From a feature map to logits: (B, D, h, w) -> (B, K, h', w')."""

    def __init__(self, before: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.before = before
        self.last = nn.Conv2d(width, classes, 1)

    def forward(self, map_BDhw: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.last(self.before(map_BDhw))
        return logits

    @torch.inference_mode()
    def predict(self, map_Dhw: Tensor, height: int, width: int) -> NDArray[np.int64]:
        """Class of every pixel, (height, width): logits enlarged bilinearly, then the largest."""
        return largest(self(map_Dhw[None]), height, width)


def largest(logits_1Khw: Tensor, height: int, width: int) -> NDArray[np.int64]:
    """Class of every pixel, (height, width), from the logits of one image."""
    enlarged_1KHW = functional.interpolate(logits_1Khw, (height, width), mode="bilinear")
    return np.asarray(enlarged_1KHW[0].argmax(dim=0).cpu().numpy(), np.int64)


def make_decoder(config: SegmentLinearConfig, width: int, classes: int) -> SegmentationDecoder:
    """An untrained decoder of D = `width` channels; the same seed gives the same weights."""
    if config.decoder == "fcn":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            blocks = _fcn_blocks(width, config.fcn_width)
        before: nn.Module = nn.Sequential(*blocks, *_dropout(config))
        width = config.fcn_width
    else:
        norm = [nn.BatchNorm2d(width)] if config.decoder == "batch_norm" else []
        before = nn.Sequential(*norm, *_dropout(config))
    with torch.random.fork_rng(devices=[]):
        decoder = SegmentationDecoder(before, width, classes)
    nn.init.normal_(decoder.last.weight, std=0.01, generator=torch.Generator().manual_seed(config.seed))
    nn.init.zeros_(decoder.last.bias)  # type: ignore[arg-type]
    return decoder


def _dropout(config: SegmentLinearConfig) -> list[nn.Module]:
    return [nn.Dropout2d(config.dropout)] if config.dropout else []


def _fcn_blocks(width: int, inner: int) -> list[nn.Module]:
    """CoTAP's three blocks: convolutions of 1, 3 and 1 cells, each with a ReLU, then twice the size."""
    layers: list[nn.Module] = []
    for block in range(3):
        for i, kernel in enumerate((1, 3, 1)):
            channels = width if block == i == 0 else inner
            layers += [nn.Conv2d(channels, inner, kernel, padding=kernel // 2), nn.ReLU()]
        layers.append(nn.Upsample(scale_factor=2, mode="bilinear"))
    return layers


def fit(
    maps_nDhw: NDArray[np.float16],
    labels_nSS: NDArray[np.int16],
    rows: NDArray[np.int64],
    classes: int,
    *,
    lr: float,
    config: SegmentLinearConfig,
    device: torch.device,
    report: Callable[[int], None] = lambda samples: None,
) -> SegmentationDecoder:
    """A decoder trained by the cross-entropy of its bilinearly enlarged logits, in eval use.

    The same seed gives the same decoder on the same kind of device.

    Args:
        maps_nDhw: cached feature maps.
        labels_nSS: class indices; those below 0 do not count.
        rows: the cached images to learn from, in shuffled epochs.
        classes: K.
        lr: learning rate.
        config: says the decoder, the samples in all or the epochs, the optimiser and the schedule.
        device: where the training runs.
        report: called after each step with the number of samples so far.
    """
    samples = total_samples(config, len(rows))
    recipe = config.training or ProbeTraining()
    decoder = make_decoder(config, maps_nDhw.shape[1], classes).to(device)
    optimizer = _optimizer(decoder, recipe, lr)
    done, side = 0, labels_nSS.shape[1]
    enlarge_h = enlarge_w = torch.empty(0)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)  # of dropout
        for chosen in draws(rows, samples, config.batch_size, config.seed):
            for group in optimizer.param_groups:
                group["lr"] = lr * rate_factor(recipe, done, samples, lr)
            maps_BDhw = torch.from_numpy(maps_nDhw[chosen]).to(device).float()
            labels_BSS = torch.from_numpy(labels_nSS[chosen]).to(device).long()
            logits = decoder(maps_BDhw)
            if not done:
                enlarge_h, enlarge_w = (enlarging(small, side).to(device) for small in logits.shape[2:])
            logits = enlarge_h @ logits @ enlarge_w.T
            total = functional.cross_entropy(logits, labels_BSS, ignore_index=-1, reduction="sum")
            loss = total / (labels_BSS >= 0).sum().clamp(min=1)  # a batch of void alone must not divide by zero
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            done += len(chosen)
            report(done)
    return decoder.eval().requires_grad_(False)


def total_samples(config: SegmentLinearConfig, count: int) -> int:
    """Training images in all, repeats included, of `count` cached ones."""
    return config.samples if config.epochs is None else config.epochs * count


def _optimizer(decoder: nn.Module, recipe: ProbeTraining, lr: float) -> torch.optim.Optimizer:
    parameters = list(decoder.parameters())
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr, weight_decay=recipe.weight_decay)


def rate_factor(recipe: ProbeTraining, done: int, samples: int, lr: float) -> float:
    """What the learning rate is multiplied by after `done` of all samples."""
    if done < recipe.warmup:
        return (done + 1) / (recipe.warmup + 1)
    progress = (done - recipe.warmup) / max(1, samples - recipe.warmup)
    final = recipe.final_lr / lr
    if recipe.schedule == "step":
        return 0.1 if done >= recipe.step_at * samples else 1.0
    if recipe.schedule == "cosine":
        return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
    return final + (1 - final) * (1 - progress) if recipe.schedule == "linear" else 1.0


def enlarging(small: int, large: int) -> Tensor:
    """Linear interpolation of one side as a matrix, (large, small).

    Two products enlarge a map exactly as `interpolate(mode="bilinear")` does, at half its cost on a CPU, forward and
    backward.
    """
    return functional.interpolate(torch.eye(small)[None], large, mode="linear")[0].T.contiguous()


def draws(rows: NDArray[np.int64], samples: int, batch_size: int, seed: int) -> Iterator[NDArray[np.int64]]:
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
