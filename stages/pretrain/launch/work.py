"""A rank of the `pretrain` stage: puts its training together, keeps a step that went wrong, writes the files."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from pipeline.stage import Outcome
from stages.pretrain.config.pretrain import PretrainConfig
from stages.pretrain.launch.artifact import write_artifact
from stages.pretrain.launch.assemble import Pretraining, assemble
from stages.pretrain.launch.continuing import FromKeptState
from stages.pretrain.launch.replay import leaver
from stages.training.checkpoint import TrainingState
from stages.training.launch.work import Work
from stages.training.loop import Checkpoints, LeaveReplay, Training
from stages.training.settings import TrainingConfig


class PretrainWork(Work):
    """Pre-training with any method."""

    Config: ClassVar[type[TrainingConfig]] = PretrainConfig
    started: FromKeptState  # what the training began with

    def assemble(self, **given: Any) -> Pretraining:
        """The method, its data and its schedule lengths."""
        return assemble(self.settings, self.inputs, **given)

    def checkpoints(self, own: Checkpoints, training: Training) -> FromKeptState:
        """Its own; where there are none yet, the state that another stage has kept."""
        self.started = FromKeptState(own, self.inputs, training.last_step)
        return self.started

    def take_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Its state may be kept in the artifact."""
        self.started.optimizer = optimizer

    def leave_replay(self, training: Training) -> LeaveReplay:
        """Writes a file with which the step can be run again alone."""
        return leaver(self.settings, self.inputs, training, self.output)

    def write(self, training: Training, state: TrainingState) -> Outcome:
        """The encoder, its curves and its pictures."""
        assert isinstance(training, Pretraining)
        return write_artifact(self.settings, self.inputs, self.output, training, state, self.started)
