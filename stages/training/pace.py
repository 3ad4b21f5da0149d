"""When the next checkpoint is due: by time, as often as saving is cheap, and at a fixed step where the settings say so.

A checkpoint may take `SHARE` of the training's time. What one takes is measured as training goes, so that a small
training on a laptop saves every few seconds, and a large one on a slow store every `checkpoint_minutes`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from stages.training.settings import LoopSettings

SHARE = 0.02  # of the training's time that checkpoints take, as long as the longest interval allows
LEAST_SECONDS = 2.0  # between two checkpoints: less would only wear the disk
GUESSED_RATE = 200e6  # bytes a second: what the first checkpoint is expected to be written with


class Pace:
    """Tells one rank when it wants a checkpoint. With intervals by time, only rank 0's clock counts (loop.py).

    Args:
        settings: `checkpoint_every` steps, else `checkpoint_minutes` at most.
        first_guess: seconds that a checkpoint is expected to take before one was made (`guess_seconds`).
        clock: seconds from any start.
    """

    def __init__(self, settings: LoopSettings, first_guess: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.every, self.longest, self.clock = settings.checkpoint_every, 60 * settings.checkpoint_minutes, clock
        self.saved(first_guess)

    def due(self, done: int) -> bool:
        """Whether a checkpoint should follow the step that makes them `done`."""
        if self.every is not None:
            return done % self.every == 0
        return self.clock() >= self.next

    def saved(self, seconds: float) -> None:
        """A checkpoint has just been made, and took so long."""
        self.next = self.clock() + min(self.longest, max(LEAST_SECONDS, seconds / SHARE))


def guess_seconds(method: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """What the first checkpoint may take, from the bytes that it will hold once the optimiser has its state."""
    held = sum(t.numel() * t.element_size() for t in (*method.parameters(), *method.buffers()))
    moments = 2 if isinstance(optimizer, torch.optim.AdamW) else 1
    trained = (p for group in optimizer.param_groups for p in group["params"])
    return (held + moments * sum(p.numel() * p.element_size() for p in trained)) / GUESSED_RATE
