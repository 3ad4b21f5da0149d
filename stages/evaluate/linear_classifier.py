"""A linear classifier on vectors in memory, trained by SGD with a cosine to 0. Functions of tensors.

Source: docs/methods.md#linear-classification.

Shape legend: N vectors, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.evaluate.held_out import held_out


def fit(
    vectors_ND: Tensor,
    labels_N: Tensor,
    *,
    classes: int,
    lr: float,
    epochs: int,
    batch_size: int,
    momentum: float,
    weight_decay: float,
    seed: int,
    report: Callable[[int], None] = lambda epoch: None,
) -> nn.Linear:
    """The trained layer, in eval use. The same seed gives the same layer on the same kind of device.

    Args:
        vectors_ND: what it learns from.
        labels_N: their classes.
        classes: C.
        lr: peak learning rate for a batch of 256; scaled with the batch.
        epochs: passes over the vectors.
        batch_size: vectors a step; the last batch of a pass may be smaller.
        momentum: SGD's.
        weight_decay: SGD's.
        seed: of the initial weights and of the order.
        report: called after each pass.
    """
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(vectors_ND.shape[1], classes)
    with torch.no_grad():
        layer.weight.normal_(std=0.01, generator=generator)
        layer.bias.zero_()
    peak = lr * min(batch_size, len(vectors_ND)) / 256
    optimizer = torch.optim.SGD(layer.parameters(), lr=peak, momentum=momentum, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        for rows in torch.split(torch.randperm(len(vectors_ND), generator=generator), batch_size):
            loss = functional.cross_entropy(layer(vectors_ND[rows]), labels_N[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
        report(epoch + 1)
    return layer.requires_grad_(False)


def choose_rate(vectors_ND: Tensor, labels_N: Tensor, rates: Sequence[float], *, seed: int, **options: Any) -> float:
    """The learning rate with the most hits on a held-out fifth; the first of equals.

    Args:
        vectors_ND: what is learnt from.
        labels_N: their classes.
        rates: to try.
        seed: of the fifth, and of `fit`.
        **options: of `fit`.
    """
    if len(rates) == 1:
        return rates[0]
    rest, fifth = (torch.from_numpy(rows) for rows in held_out(len(vectors_ND), seed))
    hits = []
    for rate in rates:
        layer = fit(vectors_ND[rest], labels_N[rest], lr=rate, seed=seed, **options)
        hits.append(int((layer(vectors_ND[fifth]).argmax(dim=1) == labels_N[fifth]).sum()))
    return rates[hits.index(max(hits))]


def standardised(train_ND: Tensor, test_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the mean and the deviation of the train vectors taken out, channel by channel."""
    mean_D, deviation_D = train_ND.mean(dim=0), train_ND.std(dim=0, correction=0).clamp(min=1e-6)
    return (train_ND - mean_D) / deviation_D, (test_MD - mean_D) / deviation_D
