"""A training that begins where another stage's has ended, and the state that a stage keeps so that one can."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from pipeline.errors import StageFailed
from pipeline.store.artifact import Artifact
from pipeline.store.writer import ArtifactWriter
from stages.pretrain.config.continuing import CONTINUE
from stages.training.checkpoint import STATE_FILES, TrainingState, read_state, tensors_of, write_state
from stages.training.loop import Checkpoints

FOLDER = "training_state"  # in the artifact


class FromKeptState:
    """Checkpoints of a training; where it has none yet, it begins with the state that another stage has kept.

    Args:
        checkpoints: of this training.
        inputs: artifacts by dotted input path; the one at "continue", if any, holds the state.
        last_step: of this training, those of the other stage included.
    """

    def __init__(self, checkpoints: Checkpoints, inputs: Mapping[str, Artifact], last_step: int) -> None:
        self.checkpoints, self.start, self.last_step = checkpoints, inputs.get(CONTINUE), last_step
        self.optimizer: torch.optim.Optimizer | None = None  # the training's, once it has begun

    def save(self, method: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState) -> None:
        """Keep this state; called on every rank."""
        self.checkpoints.save(method, optimizer, state)

    def restore(self, method: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
        """The newest checkpoint of this training, else the other stage's last state, else a fresh one.

        Raises:
            StageFailed: the other stage has made as many steps as this one should make in all.
        """
        self.optimizer = optimizer
        state = self.checkpoints.restore(method, optimizer)
        if state.step or self.start is None:
            return state
        tensors, progress = (self.start.local(f"{FOLDER}/{name}") for name in STATE_FILES)
        state = read_state(tensors, progress, method, optimizer)
        if state.step >= self.last_step:
            raise StageFailed(
                f"continue: '{self.start.manifest.stage}' has made {state.step} steps, and this stage should make "
                f"{self.last_step} in all (give more epochs or steps: they count from the first stage's start)"
            )
        return state

    def keep(self, method: nn.Module, state: TrainingState, output: ArtifactWriter) -> int:
        """Put the state that the training has ended with into the artifact, on one rank; returns its bytes."""
        assert self.optimizer is not None, "a training restores before it ends"
        with tempfile.TemporaryDirectory() as folder:
            files = write_state(Path(folder), tensors_of(method, self.optimizer), state)
            return sum(output.put_file(f"{FOLDER}/{file.name}", file).size for file in files)
