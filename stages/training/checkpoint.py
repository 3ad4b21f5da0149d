"""Checkpoints: a folder is one only when its marker, written last, matches every file in it.

    step-00000120/
        state.pt        method and optimiser, tensors and plain containers only (read with weights_only=True)
        progress.json   step, what the run is (fingerprint), the curves so far
        complete.json   sha256 of the two, written last

A folder that a crash left half-written, or that was damaged since, is passed over and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

MARKER = "complete.json"


@dataclass
class Progress:
    """Where a run stands, beside its tensors."""

    step: int = 0  # optimiser steps done
    curves: list[dict[str, float]] = field(default_factory=list)  # one row a logged step, "step" among its keys
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> images replaced so far


def write_checkpoint(
    folder: Path, method: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, run: str
) -> None:
    """Write one checkpoint into `folder`, which must not exist; the marker comes last."""
    folder.mkdir(parents=True)
    torch.save({"method": method.state_dict(), "optimizer": optimizer.state_dict()}, folder / "state.pt")
    text = {"run": run, "step": progress.step, "curves": progress.curves, "skipped": progress.skipped}
    (folder / "progress.json").write_text(json.dumps(text))
    sums = {name: _sha256(folder / name) for name in ("state.pt", "progress.json")}
    part = folder / f"{MARKER}.part"
    with part.open("w") as file:
        json.dump(sums, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / MARKER)


def is_complete(folder: Path) -> bool:
    """Whether the marker is there and every file is what it says."""
    try:
        sums = json.loads((folder / MARKER).read_text())
        return bool(sums) and all(_sha256(folder / name) == digest for name, digest in sums.items())
    except (OSError, ValueError):
        return False


def read_checkpoint(folder: Path, method: nn.Module, optimizer: torch.optim.Optimizer | None, run: str) -> Progress:
    """Load a complete checkpoint in place. Raises ValueError if it belongs to another run."""
    text: dict[str, Any] = json.loads((folder / "progress.json").read_text())
    if text["run"] != run:
        raise ValueError(f"checkpoint {folder} belongs to run {text['run']}, not to {run}")
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    method.load_state_dict(state["method"])
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    return Progress(text["step"], text["curves"], text["skipped"])


class CheckpointFolder:
    """Checkpoints of one run under one local folder: the newest two are kept."""

    def __init__(self, root: Path, run: str, *, keep: int = 2, say: Callable[[str], None] = print) -> None:
        self.root, self.run, self.keep, self.say = root, run, keep, say

    def save(self, method: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        folder = self.root / f"step-{progress.step:08d}"
        shutil.rmtree(folder, ignore_errors=True)
        write_checkpoint(folder, method, optimizer, progress, self.run)
        for old in self._folders()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def restore(self, method: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """The newest whole checkpoint, loaded; a fresh `Progress` where there is none."""
        for folder in self._folders():
            if is_complete(folder):
                return read_checkpoint(folder, method, optimizer, self.run)
            self.say(f"checkpoint {folder.name} is not whole; going back to the one before it")
        return Progress()

    def _folders(self) -> list[Path]:
        return sorted(self.root.glob("step-*"), reverse=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
