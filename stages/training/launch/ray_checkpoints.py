"""Checkpoints through Ray Train: rank 0 writes, all ranks report, Ray Train copies them to the store and keeps two."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import ray.train
import torch
from torch import nn

from stages.training.checkpoint import TrainingState, is_complete, read_checkpoint, tensors_of, write_checkpoint


class RayCheckpoints:
    """Checkpoints of one rank.

    Args:
        fingerprint: what its checkpoints name.
        rank: of this process.
        ranks: how many there are.
        relay: actor handle: hears where training begins, and of every checkpoint (relay.py).
        last_step: after which it stops.
    """

    def __init__(self, fingerprint: str, rank: int, ranks: int, relay: Any, last_step: int) -> None:
        self.fingerprint, self.rank, self.ranks, self.relay = fingerprint, rank, ranks, relay
        self.last_step = last_step

    def save(self, method: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState) -> None:
        """Write and report a checkpoint; every rank calls it at the same steps."""
        metrics, tensors = {"step": state.step}, tensors_of(method, optimizer)
        if self.rank != 0:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "checkpoint"
            write_checkpoint(folder, tensors, state, self.fingerprint)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
        self.relay.saved.remote()

    def restore(self, method: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
        """The newest whole checkpoint, loaded; a fresh `TrainingState` where there is none."""
        state = self.newest(method, optimizer)
        if self.rank == 0:
            self.relay.start.remote(self.last_step, state.step, self.ranks)
        return state

    def newest(self, method: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
        """The same as `restore`, on one rank alone."""
        newest = ray.train.get_checkpoint()
        if newest is None:
            return TrainingState()
        older = [reported.checkpoint for reported in reversed(ray.train.get_all_reported_checkpoints())]
        for checkpoint in [newest, *older]:
            with checkpoint.as_directory() as folder:
                if is_complete(Path(folder)):
                    return read_checkpoint(Path(folder), method, optimizer, self.fingerprint)
        return TrainingState()
