"""Checkpoints: a folder is one only when its marker, written last, matches every file in it.

    step-00000120/
        state.pt        method and optimiser, tensors and plain containers only (read with weights_only=True)
        progress.json   `TrainingState`, and the fingerprint of the artifact in the making (as "run")
        complete.json   the marker: sha256 of the two, written last

A folder that a crash left half-written, or that was damaged since, is passed over and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from stages.training.sharding import whole

STATE_FILES = ("state.pt", "progress.json")
MARKER = "complete.json"


@dataclass
class TrainingState:
    """Where a training stands, beside its tensors."""

    step: int = 0  # optimiser steps done
    curves: list[dict[str, float]] = field(default_factory=list)  # one row a logged step, "step" among its keys
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> images replaced so far
    problems: dict[str, str] = field(default_factory=dict)  # key -> reason, of the first images that were replaced
    unlogged: dict[str, Any] = field(default_factory=dict)  # what the next row will hold of the steps already done
    low: dict[str, int] = field(default_factory=dict)  # what the watch counts: rows in which a number was too low
    worlds: dict[int, int] = field(default_factory=dict)  # step -> how many ranks trained from there on
    saves: int = 0  # checkpoints made before this one, in all processes
    saving_seconds: float = 0.0  # what those took on rank 0
    seconds: float = 0.0  # what all of training took, saving included


Tensors = dict[str, Any]


def tensors_of(method: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """What a checkpoint keeps of both, as whole tensors also where the ranks share them. Every rank calls it."""
    tensors = {"method": method.state_dict(), "optimizer": optimizer.state_dict()}
    return whole(tensors) if isinstance(method, FSDPModule) else tensors


def write_checkpoint(folder: Path, tensors: Tensors, state: TrainingState, fingerprint: str) -> None:
    """Write one checkpoint.

    Args:
        folder: where to; it must not exist.
        tensors: of the method and the optimiser (`tensors_of`).
        state: where the training stands.
        fingerprint: of the artifact that the training makes.
    """
    folder.mkdir(parents=True)
    sums = {file.name: _sha256(file) for file in write_state(folder, tensors, state, fingerprint)}
    part = folder / f"{MARKER}.part"
    with part.open("w") as file:
        json.dump(sums, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / MARKER)


def write_state(folder: Path, tensors: Tensors, state: TrainingState, fingerprint: str = "") -> list[Path]:
    """Write the two files of `STATE_FILES` without a marker; see `write_checkpoint` for the arguments.

    Returns:
        Their paths.
    """
    file, progress = (folder / name for name in STATE_FILES)
    torch.save(tensors, file)
    text = {"run": fingerprint, **vars(state)}
    progress.write_text(json.dumps(text))
    return [file, progress]


def read_state(
    tensors_file: Path, progress_file: Path, method: nn.Module, optimizer: torch.optim.Optimizer | None
) -> TrainingState:
    """Load what `write_state` wrote into a method and, unless it is None, an optimiser; returns where it stood."""
    text: dict[str, Any] = json.loads(progress_file.read_text())
    tensors = torch.load(tensors_file, map_location="cpu", weights_only=True)
    method.load_state_dict(tensors["method"])
    if optimizer is not None:
        optimizer.load_state_dict(tensors["optimizer"])
    state = TrainingState(**{f.name: text[f.name] for f in fields(TrainingState) if f.name in text})
    state.worlds = {int(step): ranks for step, ranks in state.worlds.items()}  # JSON's keys are strings
    return state


def is_complete(folder: Path) -> bool:
    """Whether the marker is there and every file has the checksum that it names."""
    try:
        sums = json.loads((folder / MARKER).read_text())
        return bool(sums) and all(_sha256(folder / name) == digest for name, digest in sums.items())
    except (OSError, ValueError):
        return False


def read_checkpoint(
    folder: Path, method: nn.Module, optimizer: torch.optim.Optimizer | None, fingerprint: str
) -> TrainingState:
    """Load a complete checkpoint into a method and, unless it is None, an optimiser.

    Args:
        folder: of the checkpoint; `is_complete` said that it is whole.
        method: takes the tensors, in place.
        optimizer: takes its state, in place; None where only the method is wanted.
        fingerprint: of the artifact that the training makes.

    Returns:
        Where the training stood.

    Raises:
        ValueError: when the checkpoint belongs to another artifact.
    """
    tensors, progress = (folder / name for name in STATE_FILES)
    run = json.loads(progress.read_text())["run"]
    if run != fingerprint:
        raise ValueError(f"checkpoint {folder} belongs to {run}, not to {fingerprint}")
    return read_state(tensors, progress, method, optimizer)


class CheckpointFolder:
    """Checkpoints of one training under one local folder.

    Args:
        root: the folder; each checkpoint is a folder in it.
        fingerprint: of the artifact that the training makes.
        keep: how many of the newest are kept.
        say: takes a line for the user when a checkpoint is damaged.
    """

    def __init__(self, root: Path, fingerprint: str, *, keep: int = 2, say: Callable[[str], None] = print) -> None:
        self.root, self.fingerprint, self.keep, self.say = root, fingerprint, keep, say

    def save(self, method: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState) -> None:
        """Write the checkpoint of this step, then remove all but the newest."""
        folder = self.root / f"step-{state.step:08d}"
        shutil.rmtree(folder, ignore_errors=True)
        write_checkpoint(folder, tensors_of(method, optimizer), state, self.fingerprint)
        for old in self._folders()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def restore(self, method: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
        """The newest whole checkpoint, loaded; a fresh `TrainingState` where there is none."""
        for folder in self._folders():
            if is_complete(folder):
                return read_checkpoint(folder, method, optimizer, self.fingerprint)
            self.say(f"checkpoint {folder.name} is not whole; going back to the one before it")
        return TrainingState()

    def _folders(self) -> list[Path]:
        return sorted(self.root.glob("step-*"), reverse=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
